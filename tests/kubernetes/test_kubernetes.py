# SPDX-License-Identifier: Apache-2.0
"""What deploy/kubernetes renders to: valid, closed, in agreement with itself and the commands."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml

from arrowhead_conversion.command import convert
from arrowhead_server.command import serve
from arrowhead_server.gateway.command import gateway
from arrowhead_server.gateway.embedder import INTERACTIVE

from .conftest import CONVERT, KUBERNETES, OVERLAYS, ROOT, Resource

SCHEMAS = Path(__file__).parent / "schemas"
# From the first that knows `sleep` of preStop to the newest of the validator.
VERSIONS = ("1.30", "1.37")
NAME = "app.kubernetes.io/name"
GPU = ("overlays/gpu", "triton")
PVC, OWNER = "persistentVolumeClaim", ("runAsUser", "runAsGroup", "fsGroup")
NVIDIA = "/opt/nvidia/nvidia_entrypoint.sh"
SHM = "/dev/shm"  # noqa: S108 (not a temporary file)
EVERYWHERE = "0.0.0.0"  # noqa: S104 (of its own container)
STOP_S = 5  # `Server.stop`: "stops within five seconds"
GIVES_UP_S = 300  # `START_TIMEOUT_S` of the supervisor


class Pod(NamedTuple):
    """What runs: of a Deployment, or of KServe, which puts runtime and service together."""

    name: str
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def container(self) -> dict[str, Any]:
        (only,) = self.spec["containers"]
        return only

    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}


def of_kind(resources: list[Resource], kind: str) -> list[Resource]:
    return [one for one in resources if one["kind"] == kind]


def pods(resources: list[Resource]) -> list[Pod]:
    found = [
        Pod(
            one["metadata"]["name"],
            one["spec"]["template"]["metadata"]["labels"],
            one["spec"]["template"]["spec"],
        )
        for kind in ("Deployment", "Job")
        for one in of_kind(resources, kind)
    ]
    for one in of_kind(resources, "InferenceService"):
        predictor = one["spec"]["predictor"]
        (runtime,) = of_kind(resources, "ServingRuntime")
        assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
        own = {key: value for key, value in predictor.items() if key != "model"}
        spec = {**own, **{key: runtime["spec"][key] for key in ("containers", "volumes")}}
        found.append(Pod(f"{one['metadata']['name']}-predictor", predictor["labels"], spec))
    return found


def part(resources: list[Resource], name: str) -> Pod:
    (found,) = (pod for pod in pods(resources) if pod.labels[NAME] == name)
    return found


def selected(resources: list[Resource], selector: dict[str, Any]) -> list[Pod]:
    wanted = selector.get("matchLabels", {}).items()
    assert set(selector) <= {"matchLabels"}
    return [pod for pod in pods(resources) if wanted <= pod.labels.items()]


def parsed(command: click.Command, pod: Pod) -> dict[str, Any]:
    """The options of a container's command line, by the very command."""
    words = pod.container["command"]
    program, name, *options = words[1:] if words[0] == NVIDIA else words
    assert (program, name) == ("arrowhead", command.name)
    return command.make_context(name, options).params


# ---- valid


def check(resource: Resource, version: str) -> None:
    """Raises where a field is unknown, missing or of another type."""
    group = f"{resource['apiVersion'].replace('/', '-')}-{resource['kind'].lower()}.json"
    if (schema := SCHEMAS / group).is_file():
        jsonschema.validate(resource, json.loads(schema.read_text(encoding="utf-8")))
    else:
        assert kubernetes_validate.validate(resource, version, strict=True) == version


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [*OVERLAYS, CONVERT])
def test_every_resource_is_valid(
    everything: dict[str, list[Resource]], name: str, version: str
) -> None:
    for resource in everything[name]:
        check(resource, version)


def wrong(resource: Resource) -> Resource:
    """The same with a field that there is not, where most stands."""
    changed = copy.deepcopy(resource)
    changed["spec"]["nonsense"] = 1
    return changed


def test_the_check_finds_what_is_wrong(everything: dict[str, list[Resource]]) -> None:
    seen = {one["kind"]: one for name in everything for one in everything[name] if "spec" in one}
    theirs = {"PodMonitor", "PrometheusRule", "ScaledObject", "InferenceService"}
    assert {"Deployment", "Job", *theirs} <= set(seen)
    for resource in seen.values():
        with pytest.raises(jsonschema.ValidationError, match="nonsense"):
            check(wrong(resource), VERSIONS[-1])


def test_what_stands_for_a_pod_at_kserve_is_one(everything: dict[str, list[Resource]]) -> None:
    """KServe's schemas leave out rules that a pod's has."""
    pod = part(everything["overlays/kserve"], "triton")
    kserves = {"labels", "maxReplicas", "minReplicas"}
    spec = {key: value for key, value in pod.spec.items() if key not in kserves}
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec}
    check(whole, VERSIONS[-1])


# ---- closed


def test_every_pod_keeps_to_the_restricted_profile(
    everything: dict[str, list[Resource]], resources: list[Resource]
) -> None:
    assert len(pods(resources)) == 3
    for pod in pods([*resources, *everything[CONVERT]]):
        assert pod.spec["automountServiceAccountToken"] is False
        assert pod.spec["enableServiceLinks"] is False
        for host in ("hostNetwork", "hostPID", "hostIPC"):
            assert host not in pod.spec
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0 < security["runAsGroup"]
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        kinds = {kind for volume in pod.spec["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "secret", "projected", "persistentVolumeClaim"}
    (namespace,) = of_kind(resources, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def quantity(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(m|[KMG]i)?", text).groups()  # type: ignore[union-attr]
    return float(number) * {None: 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[unit]


def test_every_pod_says_what_it_needs(
    everything: dict[str, list[Resource]], resources: list[Resource]
) -> None:
    for pod in pods([*resources, *everything[CONVERT]]):
        limits, requests = (pod.container["resources"][key] for key in ("limits", "requests"))
        assert set(limits) == set(requests) >= {"cpu", "memory"}
        for key in limits:
            assert quantity(str(requests[key])) <= quantity(str(limits[key]))
        for volume in pod.spec["volumes"]:
            if "emptyDir" in volume:
                assert quantity(volume["emptyDir"]["sizeLimit"]) > 0
    triton = part(resources, "triton")
    resources_of = triton.container["resources"]
    # Guaranteed, in whole cores: what gives it cores of its own.
    assert resources_of["limits"] == resources_of["requests"]
    assert float(resources_of["limits"]["cpu"]).is_integer()


def test_triton_has_shared_memory_that_fits_its_limit(resources: list[Resource]) -> None:
    triton = part(resources, "triton")
    (mount,) = (one for one in triton.container["volumeMounts"] if one["mountPath"] == SHM)
    (volume,) = (one for one in triton.spec["volumes"] if one["name"] == mount["name"])
    assert volume["emptyDir"]["medium"] == "Memory"
    limit = quantity(triton.container["resources"]["limits"]["memory"])
    assert quantity(volume["emptyDir"]["sizeLimit"]) <= limit / 2


def test_models_are_only_read(resources: list[Resource]) -> None:
    for pod in pods(resources):
        claims = {one["name"] for one in pod.spec["volumes"] if "persistentVolumeClaim" in one}
        mounts = [one for one in pod.container["volumeMounts"] if one["name"] in claims]
        assert all(one["readOnly"] is True for one in mounts)


def test_with_a_gpu_the_image_s_own_entrypoint_comes_first(
    everything: dict[str, list[Resource]],
) -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    assert f'ENTRYPOINT ["{NVIDIA}", "arrowhead"]' in dockerfile
    triton = part(everything["overlays/gpu"], "triton")
    assert triton.container["command"][:2] == [NVIDIA, "arrowhead"]


def test_images_are_pinned(resources: list[Resource]) -> None:
    for pod in pods(resources):
        assert re.search(r":\d[\w.-]*$|@sha256:[0-9a-f]{64}$", pod.container["image"])
        assert "/" not in pod.container["image"] or "." not in pod.container["image"].split("/")[0]


def test_images_are_those_of_compose(everything: dict[str, list[Resource]]) -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    theirs = {name: service["image"] for name, service in compose["services"].items()}
    for overlay in OVERLAYS:
        for pod in pods(everything[overlay]):
            service = "triton-gpu" if (overlay, pod.name) == GPU else pod.labels[NAME]
            assert pod.container["image"] == theirs[service]
    (job,) = pods(everything[CONVERT])
    assert job.container["image"] == theirs["convert"]


def test_what_is_converted_is_what_is_served(everything: dict[str, list[Resource]]) -> None:
    (writer,) = pods(everything[CONVERT])
    options = parsed(convert, writer)
    reader = part(everything["base"], "triton")
    assert options["repository"] == parsed(serve, reader)["repository"]
    claims = [
        {one["persistentVolumeClaim"]["claimName"] for one in pod.spec["volumes"] if PVC in one}
        for pod in (writer, reader)
    ]
    assert claims[0] == claims[1] != set()
    assert {key: writer.spec["securityContext"][key] for key in OWNER} == {
        key: reader.spec["securityContext"][key] for key in OWNER
    }


def test_an_overlay_names_its_own_images(
    render: Callable[[Path], list[Resource]], tmp_path: Path, overlay: str
) -> None:
    digest = "sha256:" + "5" * 64
    kustomization = {
        "resources": [os.path.relpath(KUBERNETES / overlay, tmp_path.resolve())],
        "configurations": ["images.yaml"],
        "images": [
            {"name": name, "newName": f"registry.example.org/{name}", "digest": digest}
            for name in ("arrowhead/triton", "arrowhead/gateway", "haproxy")
        ],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    images = KUBERNETES / "overlays" / "kserve" / "images.yaml"
    (tmp_path / "images.yaml").write_text(images.read_text())
    for pod in pods(render(tmp_path)):
        assert re.fullmatch(rf"registry\.example\.org/.+@{digest}", pod.container["image"])


def test_no_secret_is_in_the_tree(resources: list[Resource]) -> None:
    assert of_kind(resources, "Secret") == []
    keys = part(resources, "gateway")
    (volume,) = (one for one in keys.spec["volumes"] if "secret" in one)
    # What `arrowhead gateway --keys` takes: nobody but its owner and group.
    assert volume["secret"]["defaultMode"] == 0o440
    assert keys.spec["securityContext"]["fsGroup"] == keys.spec["securityContext"]["runAsGroup"]


# ---- what names what


def test_all_of_it_is_in_one_namespace(resources: list[Resource]) -> None:
    (namespace,) = of_kind(resources, "Namespace")
    others = [one for one in resources if one["kind"] != "Namespace"]
    assert {one["metadata"]["namespace"] for one in others} == {namespace["metadata"]["name"]}


def test_selectors_find_one_part_each(resources: list[Resource]) -> None:
    found = 0
    for resource in resources:
        spec = resource.get("spec", {})
        selectors = []
        if resource["kind"] == "Service":
            selectors = [{"matchLabels": spec["selector"]}]
        elif resource["kind"] in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
            selectors = [spec["selector"]]
        elif resource["kind"] == "NetworkPolicy":
            selectors = [spec["podSelector"]] if spec["podSelector"] else []
        for selector in selectors:
            (pod,) = selected(resources, selector)
            assert pod.labels[NAME] == resource["metadata"]["name"]
            found += 1
    assert found >= 12


def test_pods_are_spread_by_their_own_label(resources: list[Resource]) -> None:
    for pod in pods(resources):
        constraints = pod.spec["topologySpreadConstraints"]
        assert "kubernetes.io/hostname" in {one["topologyKey"] for one in constraints}
        for one in constraints:
            assert selected(resources, one["labelSelector"]) == [pod]


def test_named_ports_are_there(resources: list[Resource]) -> None:
    for service in of_kind(resources, "Service"):
        (pod,) = selected(resources, {"matchLabels": service["spec"]["selector"]})
        for port in service["spec"]["ports"]:
            assert pod.ports()[port["targetPort"]] == port["port"]
    for monitor in of_kind(resources, "PodMonitor"):
        (pod,) = selected(resources, monitor["spec"]["selector"])
        assert {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]} <= set(pod.ports())
    for pod in pods(resources):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            check = pod.container[probe]
            (how,) = (check[key] for key in ("httpGet", "tcpSocket") if key in check)
            assert how["port"] in pod.ports()


def test_volumes_and_what_they_name_are_there(resources: list[Resource]) -> None:
    claims = {one["metadata"]["name"] for one in of_kind(resources, "PersistentVolumeClaim")}
    for pod in pods(resources):
        names = {volume["name"] for volume in pod.spec["volumes"]}
        assert {one["name"] for one in pod.container["volumeMounts"]} == names
        for volume in pod.spec["volumes"]:
            assert "secret" not in volume or volume["secret"]["secretName"] == "gateway-keys"
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
    for service in of_kind(resources, "InferenceService"):
        uri = service["spec"]["predictor"]["model"]["storageUri"]
        assert re.fullmatch("pvc://(.+)/", uri).group(1) in claims  # type: ignore[union-attr]


def test_the_autoscaler_scales_what_is_there(resources: list[Resource]) -> None:
    scaled = {one["metadata"]["name"]: one["spec"] for one in of_kind(resources, "ScaledObject")}
    for name, spec in scaled.items():
        assert spec["scaleTargetRef"]["name"] == part(resources, name).name
        assert 2 <= spec["minReplicaCount"] < spec["maxReplicaCount"]
        assert spec["fallback"]["replicas"] == spec["minReplicaCount"]
        namespaces = re.findall('namespace="(.*?)"', json.dumps(spec["triggers"]).replace("\\", ""))
        assert namespaces == ["arrowhead"] * len(spec["triggers"])
    for deployment in of_kind(resources, "Deployment"):
        # Else each `kubectl apply` would set the number back.
        is_fixed = deployment["metadata"]["name"] not in scaled
        assert ("replicas" in deployment["spec"]) == is_fixed


def test_there_are_gateways_enough_to_keep_all_tritons_at_work(
    everything: dict[str, list[Resource]],
) -> None:
    base = {
        one["metadata"]["name"]: one["spec"]["replicas"]
        for one in of_kind(everything["base"], "Deployment")
    }
    assert base["gateway"] * INTERACTIVE >= base["triton"]
    scaled = {
        one["metadata"]["name"]: one["spec"]
        for one in of_kind(everything["overlays/cpu"], "ScaledObject")
    }
    for most in ("minReplicaCount", "maxReplicaCount"):
        assert scaled["gateway"][most] * INTERACTIVE >= scaled["triton"][most]


def test_a_budget_lets_a_node_be_drained(resources: list[Resource]) -> None:
    for budget in of_kind(resources, "PodDisruptionBudget"):
        assert budget["spec"]["maxUnavailable"] in (1, "100%")


# ---- in agreement with the commands


def test_triton_listens_where_its_ports_are_named(resources: list[Resource]) -> None:
    triton = part(resources, "triton")
    options = parsed(serve, triton)
    assert options["host"] == EVERYWHERE
    named = {name.removesuffix("_port"): port for name, port in options.items() if "port" in name}
    assert triton.ports() == named
    mounts = {one["mountPath"] for one in triton.container["volumeMounts"] if one.get("readOnly")}
    repository = str(options["repository"])
    assert {repository} == mounts or repository == "/mnt/models"  # KServe mounts that by itself


def test_the_gateway_listens_and_asks_where_it_should(resources: list[Resource]) -> None:
    pod = part(resources, "gateway")
    options = parsed(gateway, pod)
    assert options["host"] == EVERYWHERE
    assert pod.ports() == {"http": options["port"]}
    service, port = re.fullmatch(r"grpc://(.+):(\d+)", options["url"]).groups()  # type: ignore[union-attr]
    (found,) = (one for one in of_kind(resources, "Service") if one["metadata"]["name"] == service)
    assert int(port) in {one["port"] for one in found["spec"]["ports"]}
    mounts = {one["name"]: one["mountPath"] for one in pod.container["volumeMounts"]}
    assert str(options["keys_file"].parent) == mounts["keys"]
    assert options["open"] is False


def test_a_pod_is_given_the_time_that_it_takes_to_stop(resources: list[Resource]) -> None:
    for name, command in (("triton", serve), ("gateway", gateway)):
        pod = part(resources, name)
        drain = parsed(command, pod)["drain_s"]
        probe = pod.container["readinessProbe"]
        # Long enough for whoever looks at /ready to have seen it, and no longer than it may take.
        assert drain > probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
        assert drain + 2 * STOP_S < pod.spec["terminationGracePeriodSeconds"]
    haproxy = part(resources, "haproxy")
    # Its /ready wants a gateway, whose /ready wants HAProxy.
    assert haproxy.container["readinessProbe"]["httpGet"]["path"] == "/metrics"
    waits = haproxy.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    ends = int(re.search(r"hard-stop-after (\d+)s", haproxy_configuration()).group(1))  # type: ignore[union-attr]
    assert waits + ends < haproxy.spec["terminationGracePeriodSeconds"]


def test_probes_ask_what_they_mean(resources: list[Resource]) -> None:
    triton = part(resources, "triton").container
    asked = {probe: triton[probe]["httpGet"] for probe in triton if probe.endswith("Probe")}
    assert asked == {
        "startupProbe": {"path": "/ready", "port": "health"},
        "readinessProbe": {"path": "/ready", "port": "health"},
        "livenessProbe": {"path": "/live", "port": "health"},
    }
    start = triton["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] > GIVES_UP_S


# ---- Prometheus' rules


@pytest.fixture(scope="module")
def monitored(
    render: Callable[[Path], list[Resource]], tmp_path_factory: pytest.TempPathFactory
) -> list[Resource]:
    """An overlay of somebody's own: monitoring, and no autoscaler."""
    folder = tmp_path_factory.mktemp("monitored").resolve()
    kustomization = {
        "resources": [os.path.relpath(KUBERNETES / "base", folder)],
        "components": [os.path.relpath(KUBERNETES / "components/monitoring", folder)],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(folder)


def alerts() -> Resource:
    file = ROOT / "deploy" / "prometheus" / "alerts.yml"
    read: Resource = yaml.safe_load(file.read_text(encoding="utf-8"))
    return read


def test_the_rules_are_those_of_the_stack(monitored: list[Resource]) -> None:
    (rule,) = of_kind(monitored, "PrometheusRule")
    assert rule["spec"] == alerts(), "scripts/prometheus-rule makes it anew"
    check(rule, VERSIONS[-1])


def test_nobody_is_missed_where_an_autoscaler_decides(
    everything: dict[str, list[Resource]],
) -> None:
    groups = {group["name"]: group for group in alerts()["groups"]}
    assert set(groups) == {"arrowhead", "fleet"}
    for overlay in ("overlays/cpu", "overlays/gpu", "overlays/kserve"):
        (rule,) = of_kind(everything[overlay], "PrometheusRule")
        assert rule["spec"]["groups"] == [groups["arrowhead"]]


def test_prometheus_takes_the_rules(monitored: list[Resource], tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        assert not os.environ.get("CI"), "scripts/test-packages installs prometheus"
        pytest.skip("no promtool: scripts/test-packages installs it")
    (rule,) = of_kind(monitored, "PrometheusRule")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rule["spec"]))
    run = subprocess.run(
        [promtool, "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_jobs_have_the_names_that_the_rules_ask_for(monitored: list[Resource]) -> None:
    jobs = set()
    for monitor in of_kind(monitored, "PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            (relabeling,) = endpoint["relabelings"]
            assert relabeling["targetLabel"] == "job"
            jobs.add(relabeling["replacement"])
            (pod,) = selected(monitored, monitor["spec"]["selector"])
            assert endpoint["port"] in pod.ports()
    stack = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert jobs == {job["job_name"] for job in stack["scrape_configs"]}
    asked = re.findall(r'job=~?"(.*?)"', json.dumps(alerts()).replace("\\", ""))
    assert asked
    assert {name for names in asked for name in names.split("|")} <= jobs


def test_series_that_others_have_too_are_asked_for_by_job() -> None:
    """On a whole cluster's Prometheus, other Tritons and other HAProxies are none of ours."""
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/arrowhead.json").read_text())
    asked = [rule["expr"] for group in alerts()["groups"] for rule in group["rules"]]
    asked += [query["expr"] for panel in dashboard["panels"] for query in panel.get("targets", [])]
    selectors = re.findall(r"\b(up|(?:nv|haproxy|process)_\w+)\b(\S*)", "\n".join(asked))
    assert {"up", "nv_gpu_utilization", "haproxy_backend_current_queue"} <= dict(selectors).keys()
    for name, selector in selectors:
        assert re.match(r'\{job=~?"arrowhead-', selector), name


# ---- HAProxy's own file


def haproxy_configuration() -> str:
    return (ROOT / "deploy" / "haproxy" / "haproxy.cfg").read_text(encoding="utf-8")


def test_haproxy_gets_the_stacks_own_file(resources: list[Resource]) -> None:
    assert configuration(resources)["haproxy.cfg"] == haproxy_configuration()


def configuration(resources: list[Resource]) -> dict[str, str]:
    """The files of HAProxy's folder."""
    (volume,) = (one for one in part(resources, "haproxy").spec["volumes"] if "projected" in one)
    names = [one["configMap"]["name"] for one in volume["projected"]["sources"]]
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind(resources, "ConfigMap")}
    assert set(maps) == set(names)
    return {file: content for name in names for file, content in maps[name].items()}


def test_haproxy_takes_its_configuration(resources: list[Resource], tmp_path: Path) -> None:
    haproxy = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    if haproxy is None:
        assert not os.environ.get("CI"), "scripts/test-packages installs haproxy"
        pytest.skip("no haproxy: scripts/test-packages installs it")
    for name, content in configuration(resources).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    container = part(resources, "haproxy").container
    names = {one["name"]: one["value"] for one in container["env"]}
    assert re.fullmatch(r"[\w.-]+:53", names["ARROWHEAD_DNS"])
    # A cluster's names mean nothing here, and HAProxy looks up its name server's when it starts.
    environment = {**os.environ, **names, "ARROWHEAD_DNS": "127.0.0.1:53"}
    command = [*container["command"][:-1], str(tmp_path), "-c"]
    run = subprocess.run([haproxy, *command[1:]], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    threads = int(re.search(r"nbthread (\d+)", configuration(resources)["threads.cfg"]).group(1))  # type: ignore[union-attr]
    assert threads == int(container["resources"]["limits"]["cpu"])


def test_haproxy_looks_up_the_services_that_there_are(resources: list[Resource]) -> None:
    names = {one["name"]: one["value"] for one in part(resources, "haproxy").container["env"]}
    for name in ("triton", "gateway"):
        (service,) = (
            one for one in of_kind(resources, "Service") if one["metadata"]["name"] == name
        )
        # Headless: an address for each pod.
        assert service["spec"]["clusterIP"] == "None"
        assert names[f"ARROWHEAD_{name.upper()}"] == (
            f"{name}.{service['metadata']['namespace']}.svc.cluster.local"
        )


def test_haproxy_has_room_for_all_replicas(resources: list[Resource]) -> None:
    room = re.findall(r"server-template (\w+) 1-(\d+)", haproxy_configuration())
    assert {name for name, _ in room} == {"triton", "gateway"}
    most = {one["metadata"]["name"]: one["spec"] for one in of_kind(resources, "Deployment")}
    for name, slots in room:
        replicas = most.get(name, {}).get("replicas", 0)
        for one in of_kind(resources, "ScaledObject"):
            if one["metadata"]["name"] == name:
                replicas = one["spec"]["maxReplicaCount"]
        assert 0 < replicas + 1 <= int(slots)  # one more, while they are replaced


def test_haproxy_may_go_where_its_checks_go(resources: list[Resource]) -> None:
    checks = re.findall(r"http-check connect .*?port (\d+)", haproxy_configuration())
    assert checks
    open_ = {port for who, to, port in ways(resources) if (who, to) == ("haproxy", "triton")}
    assert {int(port) for port in checks} <= open_


def test_haproxy_listens_where_its_ports_are_named(resources: list[Resource]) -> None:
    bound = re.findall(r"^\s*bind\s+.*?:(\d+)", haproxy_configuration(), re.MULTILINE)
    ports = part(resources, "haproxy").ports()
    assert sorted(map(int, bound)) == sorted(ports.values())


# ---- the network


def ways(resources: list[Resource]) -> set[tuple[str, str, int]]:
    """Every way that the policies leave open: from, to, port; both ends must let it pass."""
    let_in: set[tuple[str, str, int]] = set()
    let_out: set[tuple[str, str, int]] = set()
    for policy in of_kind(resources, "NetworkPolicy"):
        for pod in selected(resources, policy["spec"]["podSelector"]):
            own = pod.labels[NAME]
            for rule in policy["spec"].get("ingress", []):
                for peer in rule["from"]:
                    let_in |= {(who, own, port) for who, port in met(resources, peer, rule, pod)}
            for rule in policy["spec"].get("egress", []):
                for peer in rule["to"]:
                    let_out |= {(own, who, port) for who, port in met(resources, peer, rule)}
    ours = {pod.labels[NAME] for pod in pods(resources)}
    from_others = {way for way in let_in if way[0] not in ours}
    to_others = {way for way in let_out if way[1] not in ours}
    return from_others | to_others | (let_in & let_out)


def met(
    resources: list[Resource], peer: dict[str, Any], rule: dict[str, Any], to: Pod | None = None
) -> Iterator[tuple[str, int]]:
    """Who a peer is, and the ports, which are `to`'s or else the peer's own."""
    assert set(peer) <= {"podSelector", "namespaceSelector"}
    there: list[tuple[str, Pod | None]]
    if "namespaceSelector" in peer:
        (who,) = peer["namespaceSelector"]["matchLabels"].values()
        there = [(who, to)]
    else:
        there = [(pod.labels[NAME], to or pod) for pod in selected(resources, peer["podSelector"])]
    for name, pod in there:
        for port in rule["ports"]:
            assert set(port) == {"protocol", "port"}
            named = port["port"]
            yield name, named if pod is None or isinstance(named, int) else pod.ports()[named]


def test_only_the_named_ways_are_open(resources: list[Resource]) -> None:
    assert ways(resources) == {
        ("clients", "haproxy", 8080),
        ("haproxy", "gateway", 8080),
        ("gateway", "haproxy", 8001),
        ("haproxy", "triton", 8001),
        ("haproxy", "triton", 8003),
        ("metrics", "haproxy", 8404),
        ("metrics", "gateway", 8080),
        ("metrics", "triton", 8002),
        ("metrics", "triton", 8003),
        ("haproxy", "kube-system", 53),
        ("gateway", "kube-system", 53),
        ("triton", "kube-system", 53),
    }
    everybody = [
        one["spec"]
        for one in of_kind(resources, "NetworkPolicy")
        if one["spec"]["podSelector"] == {}
    ]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in everybody
