"""Width variants: from a few real exports to an ONNX file of any widths, in milliseconds.

Names in an exported file are no guide to what its dimensions mean: the exporter folds, transposes and merges constants.
So each integer that may depend on the widths (initializer dimensions, integer attributes, entries of small integer
constants, output dimensions) is *solved*: its values over the exports are compared with those of every dimension form
the program has. How a padding splits into before and after depends on which channels are kept, so a padded axis gets the
difference of the forms around it, all of it before; that costs the same. All float weights point into one random blob,
so a variant is a few kB and hundreds share the blob.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.errors import TableError
from toolkit.schema import DimForm

Widths = Mapping[str, int]
Export = tuple[Widths, Any]  # (width of each group, onnx.ModelProto)

BLOB = "blob.bin"
INLINE_ELEMENTS = 1024  # tensors under this keep the dense values, sliced
ALIGNMENT = 4096  # of a section in the blob, so that it can be mapped
MAX_CONSTANT = 64  # longest integer constant whose entries may be dimensions
DRAWS = 400


@dataclass(frozen=True)
class Slot:
    """One input of one node that is fed by an initializer; `sites` lists every (node, input) that shares it."""

    name: str
    sites: tuple[tuple[int, int], ...]
    dims: tuple[DimForm, ...]
    values: tuple[DimForm, ...] | None  # entries of an integer constant that depend on the widths
    section: int | None  # power of two of the standard deviation; None: values stay in the file


@dataclass(frozen=True)
class VariantMaker:
    """Makes the ONNX model of any positive widths of the dense program it was solved for."""

    skeleton: Any  # onnx.ModelProto of the dense program without initializers; their uses are named by slot
    dense_values: Mapping[str, np.ndarray[Any, Any]]  # by slot
    widths: Mapping[str, int]
    slots: tuple[Slot, ...]
    attributes: Mapping[tuple[int, str], tuple[DimForm, ...]]
    outputs: tuple[tuple[DimForm, ...], ...]
    channels: Mapping[str, tuple[DimForm, ...]]  # form of every dimension of every tensor, where all are explained
    finish: Callable[[Any], Any] | None = None  # what turns a variant into what is measured, such as Q/DQ around its layers
    in_float: frozenset[str] = frozenset()  # nodes that stay in fp32 all the same

    @cached_property
    def sections(self) -> dict[int, tuple[int, int]]:
        """Blob sections: power of two -> (offset, size), both in bytes. A section holds the largest tensor of its class."""
        sizes: dict[int, int] = {}
        for slot in self.slots:
            if slot.section is not None:
                sizes[slot.section] = max(sizes.get(slot.section, 0), self.dense_values[slot.name].nbytes)
        laid: dict[int, tuple[int, int]] = {}
        end = 0
        for power in sorted(sizes):
            laid[power] = (end, sizes[power])
            end += math.ceil(sizes[power] / ALIGNMENT) * ALIGNMENT
        return laid

    def make(self, widths: Widths, *, inline: bool = False) -> Any:
        """The model at these widths. Large weights are in the blob beside it; `inline`: they are the dense ones, sliced."""
        import onnx

        if bad := [name for name in self.widths if widths.get(name, 0) < 1]:
            raise TableError(
                f"A width variant needs at least one channel in every group; {bad[0]} has {widths.get(bad[0], 0)}.",
                "Export the program without that branch and pass it as an extra network.",
            )
        model = onnx.ModelProto()
        model.CopyFrom(self.skeleton)
        for (node, name), forms in self.attributes.items():
            attribute = next(a for a in model.graph.node[node].attribute if a.name == name)
            values = [form.at(widths) for form in forms]
            if attribute.type == onnx.AttributeProto.INT:
                attribute.i = values[0]
            else:
                attribute.ints[:] = values
        for slot in self.slots:
            model.graph.initializer.append(self._tensor(slot, widths, inline))
        for output, forms in zip(model.graph.output, self.outputs, strict=True):
            for dim, form in zip(output.type.tensor_type.shape.dim, forms, strict=True):
                if dim.HasField("dim_value"):
                    dim.dim_value = form.at(widths)
        return model

    def finished(self, widths: Widths) -> Any:
        """The model at these widths as it is measured: large weights in the blob, or finished with the dense ones, sliced."""
        return self.finish(self.make(widths, inline=True)) if self.finish else self.make(widths)

    def write(self, widths: Widths, folder: Path, name: str = "variant.onnx") -> Path:
        """Write the variant into `folder`, and the blob beside it if it is not there."""
        import onnx

        folder.mkdir(parents=True, exist_ok=True)
        blob, model = folder / BLOB, self.finished(widths)
        if self.finish is None and self.sections and not (blob.exists() and blob.stat().st_size == self.blob_bytes):
            self._write_blob(blob)
        path = folder / name
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(path))
        return path

    @property
    def blob_bytes(self) -> int:
        return max((offset + size for offset, size in self.sections.values()), default=0)

    def _tensor(self, slot: Slot, widths: Widths, inline: bool) -> Any:
        from onnx import TensorProto, numpy_helper

        dims = [form.at(widths) for form in slot.dims]
        value = self.dense_values[slot.name]
        if slot.section is not None and not inline:
            tensor = TensorProto(name=slot.name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
            entries = {"location": BLOB, "offset": self.sections[slot.section][0], "length": math.prod(dims) * 4}
            for key, entry in entries.items():
                tensor.external_data.add(key=key, value=str(entry))
            return tensor
        if slot.values is not None:
            sliced = np.array([form.at(widths) for form in slot.values], value.dtype).reshape(value.shape)
        else:
            sliced = np.array(value[tuple(slice(n) for n in dims)], order="C")
        return numpy_helper.from_array(sliced, slot.name)

    def _write_blob(self, path: Path) -> None:
        rng = np.random.default_rng(0)
        with path.open("wb") as stream:
            for power, (offset, size) in self.sections.items():
                stream.seek(offset)
                stream.write((rng.standard_normal(size // 4, np.float32) * np.float32(2.0**power)).tobytes())


# --- probes ---------------------------------------------------------------------------------------------------------------


def ambiguous_forms(forms: Sequence[DimForm], widths_list: Sequence[Widths]) -> list[tuple[DimForm, DimForm]]:
    """Pairs of distinct forms that these widths do not tell apart; a form that never varies is paired with its constant."""
    seen: dict[tuple[int, ...], DimForm] = {}
    pairs = []
    for form in dict.fromkeys(form.fixed({}) for form in forms):
        vector = _vector(form, widths_list)
        if len(set(vector)) == 1:
            if form.terms:
                pairs.append((form, DimForm(const=vector[0])))
        elif vector in seen:
            pairs.append((seen[vector], form))
        else:
            seen[vector] = form
    return pairs


def choose_probe_widths(
    groups: Mapping[str, tuple[int, int]], forms: Sequence[DimForm], seed: int = 0, probes: int = 2
) -> list[dict[str, int]]:
    """Random widths for the probes, and one more for the check: with the dense widths they tell every two forms apart.

    `groups` maps a name to (least width, full width). Takes more probes where `probes` cannot be enough. A single channel is not
    drawn where there is a choice: of a dimension of 1 exporters leave out what moves it.
    """
    rng = random.Random(seed)
    dense = {name: full for name, (_, full) in groups.items()}
    fixed = {name: full for name, (least, full) in groups.items() if max(1, least) >= full}
    forms = sorted({form.fixed(fixed) for form in forms}, key=lambda form: (form.terms, form.const))

    def draw() -> dict[str, int]:
        return {name: rng.randint(max(2 if full > 2 else 1, least), full) for name, (least, full) in groups.items()}

    for count in range(probes, probes + 4):
        for _ in range(DRAWS):
            chosen = [draw() for _ in range(count)]
            if not ambiguous_forms(forms, [dense, *chosen]):
                return [*chosen, draw()]
    message = "No probe widths tell all dimension forms of this program apart."
    raise TableError(message, "Keep some groups fixed with --keep, or report the model.")


def _vector(form: DimForm, widths_list: Sequence[Widths]) -> tuple[int, ...]:
    return tuple(form.at(widths) for widths in widths_list)


# --- solving --------------------------------------------------------------------------------------------------------------


def solve(exports: Sequence[Export], forms: Sequence[DimForm], check: Export | None = None) -> VariantMaker:
    """Map group widths to the dimensions of an exported file.

    `exports` starts with the dense program; each further one is a real export at other widths. The last, `check`, takes
    no part in solving: its dimensions must equal those of its variant.

    Raises:
        TableError: the exports differ in structure, a dimension fits no form or several, or the check fails.
    """
    models = [_light(model) for _, model in exports]
    _same_nodes(models)
    match = _matcher([widths for widths, _ in exports], forms)
    channels = _tensor_forms(models, match)
    skeleton, slots, values = _slots(exports[0][1], models, match, channels)
    maker = VariantMaker(
        skeleton=skeleton,
        dense_values=values,
        widths=dict(exports[0][0]),
        slots=slots,
        attributes=_attributes(models, match),
        outputs=tuple(
            tuple(match(sizes, f"size of output {outs[0].name}") for sizes in zip(*map(_dims, outs), strict=True))
            for outs in zip(*(model.graph.output for model in models), strict=True)
        ),
        channels=channels,
    )
    for widths, model in [*exports[1:], *([check] if check else [])]:
        _verify(maker, widths, _light(model))
    return maker


Match = Callable[[Sequence[int], str], DimForm]


def _matcher(widths_list: Sequence[Widths], forms: Sequence[DimForm]) -> Match:
    index: dict[tuple[int, ...], set[DimForm]] = {}
    for form in (form.fixed({}) for form in forms):
        index.setdefault(_vector(form, widths_list), set()).add(form)

    def match(values: Sequence[int], where: str) -> DimForm:
        vector = tuple(values)
        if len(set(vector)) == 1:
            return DimForm(const=vector[0])
        found = index.get(vector, set())
        if len(found) == 1:
            return next(iter(found))
        if not found:
            raise TableError(
                f"The {where} is {list(vector)} over the probe exports; no channel group explains it.",
                "Keep the groups around it with --keep, or report the model.",
            )
        raise TableError(
            f"The {where} is {list(vector)} over the probe exports, which {len(found)} channel forms explain.",
            "Add one more probe export at other widths.",
        )

    return match


def _light(model: Any) -> Any:
    """A copy without the data of large weights, and with Constant nodes as initializers."""
    import onnx

    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph, source = light.graph, model.graph
    graph.name = source.name
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    for tensor in source.initializer:
        if _is_large(tensor):
            graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        else:
            graph.initializer.add().CopyFrom(tensor)
    for node in source.node:
        tensor = next((a.t for a in node.attribute if a.name == "value"), None) if node.op_type == "Constant" else None
        if tensor is None:
            graph.node.add().CopyFrom(node)
        else:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = node.output[0]
    light.functions.extend(model.functions)
    _spell_out(light)
    return light


def _spell_out(model: Any) -> None:
    """Give every Reshape the sizes it arrives at, every Split those of its parts, and every Slice an end inside its tensor: where
    one export leaves them to be inferred another may not.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    shapes = _shapes(model)

    def spelled(name: str, sizes: Sequence[int]) -> str:
        model.graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
        return name

    for index, node in enumerate(model.graph.node):
        if node.op_type == "Split" and len(node.input) == 1:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            sizes = [dims[axis] for dims in (shapes.get(name, []) for name in node.output) if dims]
            if len(sizes) == len(node.output) and min(sizes) > 0:
                node.input.append(spelled(f"{node.output[0]}.sizes", sizes))
                kept = [a for a in node.attribute if a.name != "num_outputs"]
                del node.attribute[:]
                node.attribute.extend(kept)
        if node.op_type == "Slice" and len(node.input) > 3 and node.input[2] in constants and node.input[3] in constants:
            dims = shapes.get(node.input[0], [])
            ends, axes = (numpy_helper.to_array(constants[name]).tolist() for name in node.input[2:4])
            if len(dims) > max(axes) and any(0 < dims[axis] < end for end, axis in zip(ends, axes, strict=True)):
                known = [min(end, dims[axis] or end) for end, axis in zip(ends, axes, strict=True)]
                node.input[2] = spelled(f"{node.output[0]}.ends", known)
        if node.op_type != "Reshape" or node.input[1] not in constants:
            continue
        asked, dims = numpy_helper.to_array(constants[node.input[1]]), shapes.get(node.output[0], [])
        if (asked <= 0).any() and len(dims) == len(asked) and min(dims, default=0) > 0:
            node.input[1] = spelled(f"{node.input[1]}.{index}", dims)


def _is_large(tensor: Any) -> bool:
    from onnx import TensorProto

    return bool(tensor.data_type == TensorProto.FLOAT and math.prod(tensor.dims) >= INLINE_ELEMENTS)


def _same_nodes(models: Sequence[Any]) -> None:
    first = [(node.op_type, len(node.input), len(node.output)) for node in models[0].graph.node]
    for model in models[1:]:
        other = [(node.op_type, len(node.input), len(node.output)) for node in model.graph.node]
        if other != first:
            at = next((i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), min(len(first), len(other)))
            name = models[0].graph.node[at].name if at < len(first) else "the end"
            raise TableError(
                f"The pruned export has another structure than the dense one: they differ at node {at} ({name}).",
                "Probe with other widths; no group may be at a width that removes a branch.",
            )


def _slots(
    dense: Any, models: Sequence[Any], match: Match, channels: Mapping[str, tuple[DimForm, ...]]
) -> tuple[Any, tuple[Slot, ...], dict[str, np.ndarray[Any, Any]]]:
    """Skeleton, slots and the dense values. By use, not by name: constants that one export shares may differ in another."""
    import onnx
    from onnx import numpy_helper

    tables = [{tensor.name: tensor for tensor in model.graph.initializer} for model in models]
    full = {tensor.name: tensor for tensor in dense.graph.initializer}
    uses: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for node, nodes in enumerate(zip(*(model.graph.node for model in models), strict=True)):
        for place, names in enumerate(zip(*(n.input for n in nodes), strict=True)):
            held = [name in table for name, table in zip(names, tables, strict=True)]
            if all(held):
                uses.setdefault(names, []).append((node, place))
            elif any(held):
                raise TableError(f"Node {nodes[0].name} takes a constant in one export only.", "Probe with other widths.")
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(models[0])
    del skeleton.graph.initializer[:]
    slots: list[Slot] = []
    values: dict[str, np.ndarray[Any, Any]] = {}
    for names, sites in uses.items():
        name = names[0] if names[0] not in values else f"{names[0]}.{len(slots)}"
        for node, place in sites:
            skeleton.graph.node[node].input[place] = name
        tensors = [table[n] for n, table in zip(names, tables, strict=True)]
        values[name] = numpy_helper.to_array(full.get(names[0], tensors[0]))
        node, place = sites[0]
        if models[0].graph.node[node].op_type == "Pad" and place == 1:
            slots.append(_padding(name, tuple(sites), models[0].graph.node[node], tensors, tables[0], channels))
        else:
            slots.append(_slot(name, tuple(sites), values[name], tensors, match))
    return skeleton, tuple(slots), values


def _slot(
    name: str, sites: tuple[tuple[int, int], ...], dense: np.ndarray[Any, Any], tensors: Sequence[Any], match: Match
) -> Slot:
    from onnx import numpy_helper

    if len({len(tensor.dims) for tensor in tensors}) > 1:
        raise TableError(f"The constant {name} changes its rank with the widths.", "Keep the groups around it with --keep.")
    columns = zip(*(tensor.dims for tensor in tensors), strict=True)
    dims = tuple(match(sizes, f"dimension {axis} of {name}") for axis, sizes in enumerate(columns))
    values, section = None, None
    if np.issubdtype(dense.dtype, np.integer):
        if any(form.terms for form in dims):
            message = f"The integer constant {name} changes its size with the widths."
            raise TableError(message, "Keep the groups around it with --keep.")
        if dense.size <= MAX_CONSTANT:
            entries = list(zip(*(numpy_helper.to_array(tensor).ravel().tolist() for tensor in tensors), strict=True))
            values = tuple(match(entry, f"entry {index} of the constant {name}") for index, entry in enumerate(entries))
    elif dense.dtype == np.float32 and dense.size >= INLINE_ELEMENTS:
        spread = float(np.std(dense, dtype=np.float64))
        section = round(math.log2(spread)) if math.isfinite(spread) and spread > 0 else None
    return Slot(name, sites, dims, values, section)


def _padding(
    name: str,
    sites: tuple[tuple[int, int], ...],
    node: Any,
    tensors: Sequence[Any],
    constants: Mapping[str, Any],
    channels: Mapping[str, tuple[DimForm, ...]],
) -> Slot:
    """The slot of a Pad's amounts: those that change are what their axis gains, all of it before."""
    from onnx import numpy_helper

    arrays = [numpy_helper.to_array(tensor) for tensor in tensors]
    half = len(arrays[0]) // 2
    axes = numpy_helper.to_array(constants[node.input[3]]).tolist() if len(node.input) > 3 else range(half)
    values = [DimForm(const=int(entry)) for entry in arrays[0]]
    for place, axis in enumerate(axes):
        if any(array[side] != arrays[0][side] for array in arrays for side in (place, place + half)):
            before, after = channels.get(node.input[0]), channels.get(node.output[0])
            if before is None or after is None:
                raise TableError(f"The padding {node.name} changes with the widths.", "Keep the groups around it with --keep.")
            values[place], values[place + half] = _difference(after[axis], before[axis]), DimForm(const=0)
    return Slot(name, sites, (DimForm(const=2 * half),), tuple(values), None)


def _difference(left: DimForm, right: DimForm) -> DimForm:
    less = ((names, -elements) for names, elements in right.terms)
    return DimForm(const=left.const - right.const, terms=(*left.terms, *less)).fixed({})


def _attributes(models: Sequence[Any], match: Match) -> dict[tuple[int, str], tuple[DimForm, ...]]:
    """Integer attributes that change with the widths, by node and name."""
    import onnx

    found: dict[tuple[int, str], tuple[DimForm, ...]] = {}
    for index, nodes in enumerate(zip(*(model.graph.node for model in models), strict=True)):
        for attribute in nodes[0].attribute:
            if attribute.type not in (onnx.AttributeProto.INT, onnx.AttributeProto.INTS):
                continue
            rows = [next((_integers(a) for a in node.attribute if a.name == attribute.name), []) for node in nodes]
            if len({len(row) for row in rows}) > 1:
                raise TableError(f"Attribute {attribute.name} of {nodes[0].name} changes its length.", "Probe with other widths.")
            if any(row != rows[0] for row in rows):
                where = f"attribute {attribute.name} of {nodes[0].name}"
                found[index, attribute.name] = tuple(match(column, where) for column in zip(*rows, strict=True))
    return found


def _integers(attribute: Any) -> list[int]:
    return list(attribute.ints) or [attribute.i]


def _dims(value: Any) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _shapes(model: Any) -> dict[str, list[int]]:
    """Dimensions of every tensor, inferred; 0 where a dimension is symbolic."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {value.name: _dims(value) for value in [*inferred.input, *inferred.value_info, *inferred.output]}


def _tensor_forms(models: Sequence[Any], match: Match) -> dict[str, tuple[DimForm, ...]]:
    """Forms of the dimensions of every tensor, by the dense model's names; unexplained ones are left out."""
    shapes = [_shapes(model) for model in models]
    names = [tuple(value.name for value in values) for values in zip(*(m.graph.input for m in models), strict=False)]
    for nodes in zip(*(model.graph.node for model in models), strict=True):
        names.extend(zip(*(node.output for node in nodes), strict=True))
    forms: dict[str, tuple[DimForm, ...]] = {}
    for outs in names:
        rows = [table.get(name) for name, table in zip(outs, shapes, strict=True)]
        known = [row for row in rows if row is not None]
        if len(known) == len(rows) and len({len(row) for row in known}) == 1:
            try:
                forms[outs[0]] = tuple(match(column, outs[0]) for column in zip(*known, strict=True))
            except TableError:  # an intermediate nobody slices, such as a split half; only its cost would have used the form
                continue
    return forms


def _verify(maker: VariantMaker, widths: Widths, real: Any) -> None:
    """Compare a real export with the variant of its widths: every constant's dimensions, every attribute, every tensor."""
    variant = maker.make(widths)
    _same_nodes([variant, real])
    ours, theirs = _locations(variant), _locations(real)
    for where, value in ours.items():
        if theirs.get(where) != value:
            raise TableError(
                f"The width variant disagrees with a real export at {where}: {value} against {theirs.get(where)}.",
                "Add one more probe export at other widths.",
            )


def _locations(model: Any) -> dict[str, Any]:
    import onnx
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    shapes = _shapes(model)
    found: dict[str, Any] = {}
    for index, node in enumerate(model.graph.node):
        label = f"node {index} ({node.op_type})"
        for place, name in enumerate(node.input):
            if tensor := constants.get(name):
                found[f"{label}, input {place}"] = list(tensor.dims)
                if tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
                    values = numpy_helper.to_array(tensor)
                    padding = node.op_type == "Pad" and place == 1
                    found[f"{label}, values of input {place}"] = (values.reshape(2, -1).sum(0) if padding else values).tolist()
        for attribute in node.attribute:
            if attribute.type in (onnx.AttributeProto.INT, onnx.AttributeProto.INTS):
                found[f"{label}, {attribute.name}"] = _integers(attribute)
        for place, name in enumerate(node.output):
            if name in shapes:
                found[f"{label}, output {place}"] = shapes[name]
    return found
