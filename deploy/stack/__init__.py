# SPDX-License-Identifier: Apache-2.0
"""`make stack`: what docker-compose.yml runs, as plain processes. Read stack.py first."""

from deploy.stack.stack import Stack, StackError, free_prefix

__all__ = ["Stack", "StackError", "free_prefix"]
