# SPDX-License-Identifier: Apache-2.0
"""`arrowhead inspect`: a weight file as a table."""

from __future__ import annotations

from pathlib import Path

import click

from arrowhead_engine.spec import CERTIFICATE_KEY, Certificate, ModelSpec
from arrowhead_engine.weightfile import WeightFile

EXAMPLES = """
\b
Examples:
  arrowhead inspect model_repository/minilm_encoder/1/weights.parquet
  arrowhead inspect weights.parquet | sort -k4 -n | tail        (the largest tensors)

\b
It is a Parquet file, so other tools read it too:
  duckdb -c "select layer_name, num_params from 'weights.parquet'"
"""


@click.command(epilog=EXAMPLES)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def inspect(file: Path) -> None:
    """Show the weight file FILE as a table, after checking all of it.

    Prints one line a tensor (name, dtype, shape, parameters, bytes in the file, where they start),
    then the model, its certificate and the totals. Exits with 1, and the reason, if the file is not
    sound or a checksum does not match.
    """
    with WeightFile.open(file) as weights:
        weights.verify()
        spec = ModelSpec.from_metadata(weights.metadata)
        rows = [
            (
                tensor.name,
                tensor.dtype,
                "x".join(map(str, tensor.shape)) or "scalar",
                f"{tensor.num_params}",
                f"{tensor.stored_bytes}",
                "compressed" if tensor.offset is None else f"{tensor.offset}",
            )
            for tensor in weights.tensors.values()
        ]
        params = sum(tensor.num_params for tensor in weights.tensors.values())
        how = "mapped in place" if weights.mapped else "compressed, decompressed at load"
        metadata = weights.metadata
    header = ("layer_name", "dtype", "shape", "num_params", "bytes", "offset")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        click.echo(
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
    click.echo(
        f"\nmodel        {spec.architecture}, {spec.pooling} pooling, {spec.dimension} dimensions, "
        f"{spec.max_seq_length} tokens, from {spec.source.get('name', 'an unnamed source')}"
    )
    if CERTIFICATE_KEY in metadata:
        proof = Certificate.from_metadata(metadata)
        click.echo(
            f"certificate  cosine {proof.worst_cosine:.7f} worst, {proof.mean_cosine:.7f} mean "
            f"over {proof.texts} texts"
        )
    click.echo(
        f"total        {len(rows)} tensors, {params:,} parameters, "
        f"{file.stat().st_size / 1e6:.1f} MB, {how}; checksums match"
    )
