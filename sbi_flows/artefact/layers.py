"""The content of a saved posterior: a direct posterior, and layers that were derived from it.

Each layer holds what one derived posterior adds to the posterior that it was made from: a few JSON
fields and small arrays. In the file the fields of the direct posterior stand in the document
itself, and those of the layers in its list "corrections".

Public names: `SavedPosterior`, `Layer`, `Header`, `LayerCodec`, `write_layers`, `require_layers`,
`read_layer`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from sbi_flows.artefact.container import Entry
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.strict import expect_fields, expect_integer, expect_list, expect_type
from sbi_flows.core.errors import ArtefactError

MAX_LAYERS = 16
"""Maximum number of layers in a file."""


class LayerCodec(abc.ABC):
    """Abstract codec, which checks one kind of layer from an untrusted file.

    A codec knows no class of posteriors: the class makes the layer when it is saved (`to_saved`),
    and takes the checked layer when it is loaded (`from_layer`).

    Attributes:
        kind: Name of the kind in the file.
        file_format: First version of the file format that can hold the kind.
        field_names: Names of the JSON fields except `type` and `record`, as they are written.
    """

    kind: ClassVar[str]
    file_format: ClassVar[int]
    field_names: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def require(self, header: Header, dim: int, table: Mapping[str, Entry]) -> tuple[str, ...]:
        """Check the fields, and that the table holds the layer's tensors; read no array.

        Args:
            header: The layer.
            dim: Number of standard coordinates of the prior.
            table: The tensors of the file.

        Returns:
            Names of the layer's tensors, without its prefix.

        Raises:
            ArtefactError: A field is invalid, or a tensor is missing or has another shape or dtype.
        """

    @abc.abstractmethod
    def require_arrays(self, prefix: str, tensors: Tensors) -> None:
        """Raise ArtefactError if an array of a layer holds impossible numbers."""


class Layer(NamedTuple):
    """What a derived posterior adds to the posterior that it was made from.

    Attributes:
        codec: Codec of its kind.
        fields: Its JSON fields except `type` and `record`.
        tensors: Its arrays by name, without the prefix that they have in the file.
        record: What is known of the posterior beyond what draws need, as plain JSON data.
    """

    codec: LayerCodec
    fields: Mapping[str, Any]
    tensors: Tensors
    record: Mapping[str, Any]


class SavedPosterior(NamedTuple):
    """All that a file says of a posterior.

    Attributes:
        fields: JSON fields of the direct posterior, in the order in which they are written.
        tensors: Its arrays by their names in the file.
        record: Its record, as plain JSON data.
        layers: What was derived from it, innermost first.
    """

    fields: Mapping[str, Any]
    tensors: Tensors
    record: Mapping[str, Any]
    layers: tuple[Layer, ...] = ()

    def derive(self, layer: Layer) -> SavedPosterior:
        """Return this content with one more layer around it."""
        return self._replace(layers=(*self.layers, layer))

    def add_to_record(self, **facts: Any) -> SavedPosterior:
        """Return this content with more facts in the record of the outermost posterior."""
        if not self.layers:
            return self._replace(record={**self.record, **facts})
        *inner, outer = self.layers
        return self._replace(layers=(*inner, outer._replace(record={**outer.record, **facts})))


class Header(NamedTuple):
    """The validated JSON of a layer, before its arrays are read.

    Attributes:
        codec: Codec of its kind.
        name: Place in the document, for error messages: "corrections[0]".
        prefix: Prefix of the names of its tensors: "corrections/0".
        fields: Its JSON fields except `type` and `record`.
        record: Its record.
        tensor_names: Names of its tensors, without the prefix.
    """

    codec: LayerCodec
    name: str
    prefix: str
    fields: Mapping[str, Any]
    record: Mapping[str, Any]
    tensor_names: tuple[str, ...] = ()


def write_layers(layers: Sequence[Layer], dim: int, tensors: Tensors) -> list[dict[str, Any]]:
    """Convert layers to JSON data, and check that they can be read again.

    Args:
        layers: The layers, innermost first.
        dim: Number of standard coordinates of the prior.
        tensors: Tensors of the file, to which those of the layers are added.

    Raises:
        ValueError: A layer could not be read again.
    """
    document, arrays = [], Tensors()
    for i, layer in enumerate(layers):
        document.append({"type": layer.codec.kind, **layer.fields, "record": dict(layer.record)})
        arrays |= {f"corrections/{i}/{name}": array for name, array in layer.tensors.items()}
    table = {name: Entry(array.dtype, array.shape, 0) for name, array in arrays.items()}
    codecs = {layer.codec.kind: layer.codec for layer in layers}
    try:
        for header in require_layers(document, codecs, dim, table):
            read_layer(header, arrays.__getitem__)
    except ArtefactError as error:
        raise ValueError(f"the correction cannot be saved: {error}") from None
    tensors |= arrays
    return document


def require_layers(
    value: Any, codecs: Mapping[str, LayerCodec], dim: int, table: Mapping[str, Entry]
) -> list[Header]:
    """Check the JSON data of layers, and that the table holds all their tensors.

    Args:
        value: The list "corrections" of the document.
        codecs: Codec of each kind.
        dim: Number of standard coordinates of the prior.
        table: The tensors of the file.

    Raises:
        ArtefactError: The data are malformed, or a tensor is missing or has another shape or dtype.
    """
    value = expect_list("corrections", value, MAX_LAYERS)
    expect_integer("corrections: number", len(value), 1, MAX_LAYERS)
    headers = []
    for i, part in enumerate(value):
        name = f"corrections[{i}]"
        part = expect_type(name, part, dict, "an object")
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in codecs:
            raise ArtefactError(f"{name}.type: expected one of {[*codecs]}, got {kind!r:.80}")
        codec = codecs[kind]
        _, *values, record = expect_fields(name, part, "type", *codec.field_names, "record")
        named_values = dict(zip(codec.field_names, values, strict=True))
        record = expect_type(f"{name}.record", record, dict, "an object")
        header = Header(codec, name, f"corrections/{i}", named_values, record)
        headers.append(header._replace(tensor_names=codec.require(header, dim, table)))
    return headers


def read_layer(header: Header, read: Callable[[str], np.ndarray]) -> Layer:
    """Read the arrays of a layer.

    Args:
        header: The layer, as `require_layers` returns it.
        read: Function from the name of a tensor to its array.

    Raises:
        ArtefactError: An array holds impossible numbers.
    """
    tensors = {name: read(f"{header.prefix}/{name}") for name in header.tensor_names}
    header.codec.require_arrays(header.prefix, tensors)
    return Layer(header.codec, header.fields, tensors, header.record)
