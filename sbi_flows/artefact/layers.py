"""Content of a saved posterior: a direct posterior, and layers for the posteriors derived from it.

A direct posterior is the result of a fit. A derived posterior is made from another posterior, for
example by a correction. Its layer holds only the data that it adds: a few JSON fields and small
arrays. In the JSON document, the fields of the direct posterior are at the top level, and the
layers are in the list "corrections".

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
    """Abstract codec that checks one kind of layer from an untrusted file.

    A codec does not know the class of the derived posterior. The class of the posterior has two
    methods: `to_saved` makes the layer when the posterior is saved, and `from_layer` makes the
    posterior from the checked layer when the file is loaded.

    Attributes:
        kind: Name of the kind in the file.
        file_format: First version of the file format that can hold the kind.
        field_names: Names of the JSON fields except `type` and `record`, in the order of the file.
    """

    kind: ClassVar[str]
    file_format: ClassVar[int]
    field_names: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def require(self, header: Header, dim: int, table: Mapping[str, Entry]) -> tuple[str, ...]:
        """Check the fields of a layer, and shape and dtype of its tensors, without reading arrays.

        Args:
            header: The layer.
            dim: Number of standard coordinates of the prior.
            table: The tensors of the file.

        Returns:
            Names of the layer's tensors, without the prefix of the layer.

        Raises:
            ArtefactError: A field is invalid, or a tensor is missing or has another shape or dtype.
        """

    @abc.abstractmethod
    def require_arrays(self, prefix: str, tensors: Tensors) -> None:
        """Raise ArtefactError if an array of a layer contains invalid numbers."""


class Layer(NamedTuple):
    """Data that a derived posterior adds to the posterior from which it was made.

    Attributes:
        codec: Codec of this kind of layer.
        fields: JSON fields of the layer except `type` and `record`.
        tensors: Arrays of the layer, by name without the prefix in the file.
        record: Information about the posterior that is not needed to draw from it, as JSON data.
    """

    codec: LayerCodec
    fields: Mapping[str, Any]
    tensors: Tensors
    record: Mapping[str, Any]


class SavedPosterior(NamedTuple):
    """Complete content of the file of a posterior.

    Attributes:
        fields: JSON fields of the direct posterior, in the order of the file.
        tensors: Arrays of the direct posterior, by their names in the file.
        record: Record of the direct posterior, as JSON data.
        layers: Layers of the derived posteriors. The first layer belongs to the posterior that
            was derived from the direct posterior. Each further layer belongs to the posterior that
            was derived from the posterior of the previous layer.
    """

    fields: Mapping[str, Any]
    tensors: Tensors
    record: Mapping[str, Any]
    layers: tuple[Layer, ...] = ()

    def derive(self, layer: Layer) -> SavedPosterior:
        """Return this content with `layer` added at the end of `layers`."""
        return self._replace(layers=(*self.layers, layer))

    def add_to_record(self, **facts: Any) -> SavedPosterior:
        """Return this content with `facts` added to the record.

        The facts are added to the record of the last layer. If there are no layers, they are added
        to the record of the direct posterior.
        """
        if not self.layers:
            return self._replace(record={**self.record, **facts})
        *inner, outer = self.layers
        return self._replace(layers=(*inner, outer._replace(record={**outer.record, **facts})))


class Header(NamedTuple):
    """Checked JSON data of a layer, before its arrays are read.

    Attributes:
        codec: Codec of this kind of layer.
        name: Position in the document, for error messages, such as "corrections[0]".
        prefix: Prefix of the names of the layer's tensors, such as "corrections/0".
        fields: JSON fields of the layer except `type` and `record`.
        record: Record of the layer.
        tensor_names: Names of the layer's tensors, without the prefix.
    """

    codec: LayerCodec
    name: str
    prefix: str
    fields: Mapping[str, Any]
    record: Mapping[str, Any]
    tensor_names: tuple[str, ...] = ()


def write_layers(layers: Sequence[Layer], dim: int, tensors: Tensors) -> list[dict[str, Any]]:
    """Convert layers to JSON data, and check that the data can be loaded.

    Args:
        layers: The layers, in the order of `SavedPosterior.layers`.
        dim: Number of standard coordinates of the prior.
        tensors: Tensors of the file. This function adds the tensors of the layers.

    Raises:
        ValueError: The data of a layer could not be loaded.
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
    """Check the JSON data of layers, and check that the file contains all of their tensors.

    Args:
        value: The list "corrections" of the document.
        codecs: Dict from each kind of layer to its codec.
        dim: Number of standard coordinates of the prior.
        table: Table of the tensors in the file.

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
        read: Function that maps the name of a tensor to its array.

    Raises:
        ArtefactError: An array contains invalid numbers.
    """
    tensors = {name: read(f"{header.prefix}/{name}") for name in header.tensor_names}
    header.codec.require_arrays(header.prefix, tensors)
    return Layer(header.codec, header.fields, tensors, header.record)
