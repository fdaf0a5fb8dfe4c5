"""As much of Kustomize as our overlays use: resources, namespace, JSON patches by kind and name, images,
replacements."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches", "replacements"}
CLUSTER_WIDE = {"Namespace"}


def render(folder: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization, in the order in which they are named."""
    file = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert file.keys() <= KNOWN, f"{folder}: this renderer does not know {file.keys() - KNOWN}"
    objects: list[dict[str, Any]] = []
    for name in file["resources"]:
        path = folder / name
        objects += render(path) if path.is_dir() else list(yaml.load_all(path.read_text(), yaml.CSafeLoader))
    for item in objects:
        if item["kind"] not in CLUSTER_WIDE:
            item["metadata"]["namespace"] = file["namespace"]
    for change in file.get("patches", []):
        for operation in yaml.safe_load(change["patch"]):
            _apply(_find(objects, change["target"]), operation)
    images = {image["name"]: f"{image['newName']}@{image['digest']}" for image in file.get("images", [])}
    for item in objects:
        for container in containers(item):
            container["image"] = images.get(container["image"], container["image"])
    for change in file.get("replacements", []):
        source = change["source"]
        parent, last = _place(_find(objects, source), source["fieldPath"])
        for target in change["targets"]:
            for path in target["fieldPaths"]:
                place, field = _place(_find(objects, target["select"]), path)
                assert field in place, f"{path} is not there"
                place[field] = parent[last]
    return objects


def _find(objects: list[dict[str, Any]], target: dict[str, Any]) -> dict[str, Any]:
    (found,) = [o for o in objects if (o["kind"], o["metadata"]["name"]) == (target["kind"], target["name"])]
    return found


def _place(node: Any, path: str) -> tuple[Any, str]:
    """What holds a path's last field, and that field; `[name=x]` is the element of a list with that name."""
    *parents, last = path.split(".")
    for part in parents:
        if part.startswith("["):
            key, _, value = part.strip("[]").partition("=")
            (node,) = [item for item in node if item.get(key) == value]
        else:
            node = node[part]
    return node, last


def containers(node: Any) -> Iterator[dict[str, Any]]:
    """Wherever they are in an object."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                yield from value
            yield from containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from containers(value)


def _apply(node: Any, operation: dict[str, Any]) -> None:
    """RFC 6902, `add` and `replace`."""
    *parents, last = [part.replace("~1", "/") for part in operation["path"].split("/")[1:]]
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    value = copy.deepcopy(operation["value"])
    match operation["op"], node:
        case "add", list() if last == "-":
            node.append(value)
        case "add", dict():
            node[last] = value
        case "replace", list():
            node[int(last)] = value
        case "replace", dict() if last in node:
            node[last] = value
        case _:
            raise AssertionError(f"{operation} has nothing to change")
