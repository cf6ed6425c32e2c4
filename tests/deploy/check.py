#!/usr/bin/env python3
"""Checks deploy/ as far as that goes without a container engine: check.py NATTER NATS_SERVER

Kubernetes manifests against the schemas of Kubernetes, and what the schemas don't say: selectors, probes, volumes, keys of
Secrets. Compose files with docker compose (or docker-compose), where there is one. Every command and environment of a natter
container is given to the natter binary (`check-config`), every configuration of a nats-server to nats-server (`-t`). The
context of the Dockerfile has what the build needs. Needs PyYAML and kubernetes-validate (requirements.txt).
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib

import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
# The oldest whose schemas must accept the manifests: preStop sleep is on by default since 1.30.
KUBERNETES = "1.30"
REGIONS = ["seoul", "frankfurt", "virginia"]

passed, failed = 0, 0


def check(what, good, why=""):
    """Counts one check, and says what failed."""
    global passed, failed
    if good:
        passed += 1
    else:
        failed += 1
        print(f"FAILED: {what}: {why}")


def run(command, env=None, **more):
    """Runs a program in a clean environment; (whether it went well, all that it said)."""
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | (env or {})
    done = subprocess.run(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, **more
    )
    return done.returncode == 0, done.stdout


def seconds(text):
    """A duration of compose or natter."""
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
    return sum(float(n) * units[unit] for n, unit in re.findall(r"([\d.]+)(ms|s|m|h)", text))


class Natter:
    """The binary: what a container would tell it."""

    def __init__(self, binary, scratch):
        self.binary, self.scratch = binary, scratch

    def settings(self, name, args, env):
        """Checks a container's arguments and environment; the configuration that results, or None."""
        files = dict(zip(args, args[1:])).get("--config")
        files = ["--config", files] if files else []
        ok, said = run([self.binary, *args, "--help"], env)
        check(f"{name}: natter {' '.join(args)}", ok, said)
        ok, said = run([self.binary, "check-config", *files], env, cwd=self.scratch)
        check(f"{name}: its configuration", ok, said)
        ok, said = run([self.binary, "show-config", *files], env, cwd=self.scratch)
        return tomllib.loads(said) if ok else None

    def drains(self, name, config, role, grace, before=0):
        """The drain ends before the container is killed."""
        if config and role == "edge":
            drain = seconds(config["edge"]["drain_timeout"]) + before
            check(f"{name}: time to drain", grace > drain, f"{drain} s to drain, killed after {grace} s")


def labels_match(selector, labels):
    return all(labels.get(key) == value for key, value in selector.items())


def kubernetes(natter, scratch):
    folder = DEPLOY / "kubernetes"
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    documents = []
    for name in [*kustomization["resources"], "secrets.example.yaml", "mongodb.yaml"]:
        for document in yaml.safe_load_all((folder / name).read_text()):
            title = f"{name}: {document['kind']} {document['metadata']['name']}"
            documents.append((title, document))
            if document["kind"] == "MongoDBCommunity":
                continue  # The operator's; no schema here.
            try:
                kubernetes_validate.validate(document, KUBERNETES, strict=True)
                check(title, True)
            except Exception as error:  # Of any of the packages below it.
                check(title, False, str(error).splitlines()[0])
    of = lambda *kinds: [(title, d) for title, d in documents if d["kind"] in kinds]
    secrets = {d["metadata"]["name"]: set(d["stringData"]) for _, d in of("Secret")}
    maps = {d["name"]: {pathlib.Path(f).name for f in d["files"]} for d in kustomization["configMapGenerator"]}

    # What containers find at /etc/natter, here: everything that any of them mounts.
    etc = scratch / "etc-natter"
    (etc / "keys").mkdir(parents=True)
    toml = (folder / "natter.toml").read_text()
    (etc / "natter.toml").write_text(toml.replace("/etc/natter/", f"{etc}/"))
    shutil.copy(ROOT / "tests/it/keys/ec_public.pem", etc / "keys/tokens.pem")

    pods = []
    for title, workload in of("Deployment", "Job"):
        template = workload["spec"]["template"]
        labels, pod = template["metadata"]["labels"], template["spec"]
        pods.append((labels, pod))
        if workload["kind"] == "Deployment":
            selector = workload["spec"]["selector"]["matchLabels"]
            check(f"{title}: selector", labels_match(selector, labels), f"{selector} does not select {labels}")
        volumes = {}
        for volume in pod["volumes"]:
            if "secret" in volume:
                name = volume["secret"]["secretName"]
                keys = {item["key"] for item in volume["secret"].get("items", [])}
                check(f"{title}: secret {name}", name in secrets and keys <= secrets[name], "not in the examples")
                volumes[volume["name"]] = {item["path"] for item in volume["secret"].get("items", [])} or secrets.get(name, set())
            else:
                name = volume["configMap"]["name"]
                check(f"{title}: config map {name}", name in maps, "not in the kustomization")
                volumes[volume["name"]] = maps.get(name, set())
        context = pod["securityContext"]
        check(f"{title}: not root", context.get("runAsNonRoot") and context.get("runAsUser"), str(context))
        for container in pod["containers"]:
            own = container["securityContext"]
            check(f"{title}: read-only", own.get("readOnlyRootFilesystem") and own["capabilities"]["drop"] == ["ALL"], str(own))
            files = set()
            for mount in container["volumeMounts"]:
                check(f"{title}: volume {mount['name']}", mount["name"] in volumes, "no such volume")
                path = mount["mountPath"]
                names = volumes.get(mount["name"], set())
                files |= {path} if "subPath" in mount else {f"{path}/{name}" for name in names}
                check(f"{title}: {mount.get('subPath')}", mount.get("subPath") in {None} | names, f"not in {names}")
            ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe in container:
                    port = container[probe]["httpGet"]["port"]
                    check(f"{title}: {probe}", port in ports, f"no port {port}")
            env = {}
            for entry in container["env"]:
                value = entry.get("value", "from-a-field")
                if value.startswith("/etc/natter/"):
                    check(f"{title}: {entry['name']}", value in files, f"{value} is not mounted: {sorted(files)}")
                env[entry["name"]] = value.replace("/etc/natter/", f"{etc}/")
                if value.startswith("/etc/natter/nats/") or value.startswith("/etc/natter/mongodb/"):
                    local = pathlib.Path(env[entry["name"]])
                    local.parent.mkdir(exist_ok=True)
                    local.write_text("mongodb://a/?replicaSet=rs" if local.name == "url" else "secret")
            config = natter.settings(title, [a.replace("/etc/natter/", f"{etc}/") for a in container["args"]], env)
            role = container["args"][0]
            sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            natter.drains(title, config, role, pod.get("terminationGracePeriodSeconds", 30), sleep)
            if config and role in ("edge", "history"):
                port = int(config[role]["listen"].rsplit(":", 1)[1])
                check(f"{title}: port", port in ports.values(), f"listens at {port}, named is {ports}")
                check(f"{title}: user", config["nats"]["user"] == role, config["nats"]["user"])
            if config and role == "history":
                helps = config["mirrors"]
                check(f"{title}: helps mirrors on", helps["user"] == "mirrors" and helps["leafnodes"], str(helps))
    for title, document in of("Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = document["spec"]
        selector = spec.get("podSelector", spec.get("selector", {}))
        selector = selector.get("matchLabels", selector)
        selected = [pod for labels, pod in pods if labels_match(selector, labels)]
        check(f"{title}: selects pods", selected, str(selector))
        if document["kind"] == "Service":
            names = {port["name"] for pod in selected for c in pod["containers"] for port in c.get("ports", [])}
            for port in spec["ports"]:
                check(f"{title}: port {port['targetPort']}", port["targetPort"] in names, f"the pods have {names}")
    workloads = {(d["kind"], d["metadata"]["name"]) for _, d in of("Deployment")}
    metrics = (ROOT / "src/telemetry/metrics.rs").read_text()
    for title, document in of("HorizontalPodAutoscaler"):
        target = document["spec"]["scaleTargetRef"]
        check(f"{title}: target", (target["kind"], target["name"]) in workloads, str(target))
        for metric in document["spec"]["metrics"]:
            name = metric["pods"]["metric"]["name"].replace("_", ".")
            check(f"{title}: metric {name}", f'"{name}"' in metrics, "natter has no such metric")
    if shutil.which("kubectl"):
        ok, said = run(["kubectl", "kustomize", str(folder)])
        check("kubectl kustomize", ok, said)
    else:
        print("skipped: kubectl kustomize (no kubectl)")
    values = yaml.safe_load((folder / "nats-values.yaml").read_text())
    users = set(re.findall(r"\$(NATTER_\w+_PASSWORD)", (ROOT / "nats/accounts.conf").read_text()))
    given = values["container"]["env"]
    leafnodes = values["config"]["leafnodes"]
    check("nats-values.yaml: leaf nodes", leafnodes["enabled"] and leafnodes["tls"]["enabled"], str(leafnodes))
    check("nats-values.yaml: passwords", users <= set(given), f"missing: {users - set(given)}")
    for name, source in given.items():
        if isinstance(source, dict):
            ref = source["valueFrom"]["secretKeyRef"]
            check(f"nats-values.yaml: {name}", ref["key"] in secrets.get(ref["name"], ()), f"{ref} is not in the examples")


def interpolated(value, env):
    """A string of a compose file, with its variables."""
    value = re.sub(r"\$\{(\w+)(?::\?|:-([^}]*))?\}", lambda m: env.get(m[1], m[2] or ""), str(value))
    return value.replace("$$", "$")


def compose(natter, nats_server, scratch):
    folder = DEPLOY / "compose"
    example = dict(
        line.split("=", 1) for line in (folder / "example.env").read_text().splitlines() if line and line[0] != "#"
    )
    tool = None
    if shutil.which("docker") and run(["docker", "compose", "version"])[0]:
        tool = ["docker", "compose"]
    elif shutil.which("docker-compose"):
        tool = ["docker-compose"]
    else:
        print("skipped: docker compose config (neither docker compose nor docker-compose)")
    for path in sorted(folder.glob("*.yaml")):
        text = path.read_text()
        for name in set(re.findall(r"\$\{(\w+):\?\}", text)):
            check(f"{path.name}: {name}", name in example, "not in example.env")
        if tool:
            copy = scratch / path.name
            # docker-compose before 2 does not know the key.
            copy.write_text(re.sub(r"(?m)^name:.*\n", "", text))
            ok, said = run([*tool, "--project-directory", str(folder), "-f", str(copy), "config", "-q"], example)
            check(f"{path.name}: {' '.join(tool)} config", ok, said)
        document = yaml.safe_load(text)
        services = document["services"]
        for name, service in services.items():
            title = f"{path.name}: {name}"
            for other in service.get("depends_on", {}):
                check(f"{title}: depends on {other}", other in services, "no such service")
            env = {key: interpolated(value, example) for key, value in service.get("environment", {}).items()}
            grace = seconds(service.get("stop_grace_period", "10s"))
            if "build" in service:
                check(f"{title}: user", service.get("user", "").startswith("65532"), "runs as root")
                for key in ("context", "dockerfile"):
                    base = folder if key == "context" else ROOT
                    check(f"{title}: {key}", (base / service["build"][key]).exists(), service["build"][key])
                config = natter.settings(title, service["command"], env)
                natter.drains(title, config, service["command"][0], grace)
                if config:
                    role = service["command"][0]
                    check(f"{title}: NATS user", config["nats"]["user"] == role, config["nats"]["user"])
                    helps = config["mirrors"]["leafnodes"]
                    helped = role == "history" and path.stem == "three-regions"
                    own = helps.removeprefix("tls://").split(":")[0] == config["nats"]["url"].split("//")[1].split(":")[0]
                    check(f"{title}: helps mirrors on", own if helped else not helps, helps)
                    check(f"{title}: its NATS", config["nats"]["url"].split("//")[1].split(":")[0] in services, config["nats"]["url"])
            elif service["image"].startswith("nats:"):
                home = scratch / path.stem / name
                for volume in service["volumes"]:
                    source, target = volume.split(":")[:2]
                    if source.startswith("./certs/"):
                        source = scratch / "certs" / pathlib.Path(source).name
                    elif source.startswith("."):
                        source = (folder / source).resolve()
                        check(f"{title}: {volume}", source.exists(), "is not there")
                    else:
                        continue
                    target = home / target.lstrip("/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
                nats_config(title, nats_server, home, service["command"][1], env)


def nats_config(title, nats_server, home, path, env):
    """Whether nats-server takes a configuration that lies below `home` as in a container."""
    for file in home.rglob("*.conf"):
        text = file.read_text()
        for folder in ("/etc/nats/tls", "/data/"):
            text = text.replace(f'"{folder}', f'"{home}{folder}')
        file.write_text(text)
    (home / "data").mkdir(exist_ok=True)
    ok, said = run([nats_server, "-t", "-c", str(home / path.lstrip("/"))], env)
    check(f"{title}: nats-server -t", ok, said)


def three_servers(nats_server, scratch):
    """The configurations that no compose file has."""
    for file in ("three.conf", "three-of-mesh.conf"):
        for region in REGIONS:
            for number in range(3):
                home = scratch / f"{file}-{region}-{number}"
                shutil.copytree(DEPLOY / "nats", home / "etc/nats/conf")
                shutil.copy(DEPLOY / f"nats/accounts/{region}.conf", home / "etc/nats/accounts.conf")
                shutil.copytree(scratch / f"certs/nats-{region}", home / "etc/nats/tls")
                env = {
                    "SERVER_NAME": f"nats-{region}-{number}",
                    "REGION": region,
                    "ROUTES": "[" + ",".join(f"nats-route://nats-{region}-{n}:6222" for n in range(3)) + "]",
                    "SPINE": f'["tls://leaf:secret@spine-{region}:7422"]',
                } | {f"NATTER_{user}_PASSWORD": "secret" for user in "EDGE HISTORY MIRRORS PROVISION OPERATOR ADMIN SYS".split()}
                nats_config(f"{file}: {region} {number}", nats_server, home, f"/etc/nats/conf/{file}", env)


def context(scratch):
    """The build of the image has all files that it needs."""
    keep = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    home = scratch / "context"
    home.mkdir()
    for pattern in keep:
        sources = sorted(ROOT.glob(pattern))
        check(f".dockerignore: {pattern}", sources, "is not there")
        for source in sources:
            target = home / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    ok, said = run(["cargo", "metadata", "--no-deps", "--offline", "--format-version", "1"], dict(os.environ), cwd=home)
    check("the manifest in the image's context", ok, said)
    for file in (home / "src").rglob("*.rs"):
        for name in re.findall(r'include_(?:str|bytes)!\("([^"]+)"\)', file.read_text()):
            if "tests/" not in name:
                check(f"{file.relative_to(home)}: {name}", (file.parent / name).exists(), "not in the context")
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    channel = tomllib.loads((ROOT / "rust-toolchain.toml").read_text())["toolchain"]["channel"]
    image = re.search(r"FROM rust:([\d.]+)", dockerfile)[1]
    check("Dockerfile: toolchain", channel.startswith(image), f"{image} in the image, {channel} here")
    check("Dockerfile: not root", re.search(r"(?m)^USER \d+", dockerfile), "no USER")


def main():
    binary, nats_server = (str(pathlib.Path(shutil.which(path) or path).resolve()) for path in sys.argv[1:3])
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        names = [f"{kind}-{region}" for region in REGIONS for kind in ("nats", "spine")]
        ok, said = run([str(DEPLOY / "nats/make-certs"), str(scratch / "certs"), *names])
        check("make-certs", ok, said)
        natter = Natter(binary, scratch)
        kubernetes(natter, scratch)
        compose(natter, nats_server, scratch)
        three_servers(nats_server, scratch)
        context(scratch)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
