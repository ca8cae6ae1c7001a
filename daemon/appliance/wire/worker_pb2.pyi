from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TensorSpec(_message.Message):
    __slots__ = ("name", "datatype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATATYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    datatype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., datatype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("backend", "model", "version", "directory", "artifact_path", "artifact_format", "artifact_precision", "artifact_sha256", "device", "precision", "options", "manifest", "inventory", "record_path")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_PATH_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_PRECISION_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_SHA256_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    INVENTORY_FIELD_NUMBER: _ClassVar[int]
    RECORD_PATH_FIELD_NUMBER: _ClassVar[int]
    backend: str
    model: str
    version: str
    directory: str
    artifact_path: str
    artifact_format: str
    artifact_precision: str
    artifact_sha256: str
    device: str
    precision: str
    options: _containers.ScalarMap[str, str]
    manifest: str
    inventory: str
    record_path: str
    def __init__(self, backend: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., directory: _Optional[str] = ..., artifact_path: _Optional[str] = ..., artifact_format: _Optional[str] = ..., artifact_precision: _Optional[str] = ..., artifact_sha256: _Optional[str] = ..., device: _Optional[str] = ..., precision: _Optional[str] = ..., options: _Optional[_Mapping[str, str]] = ..., manifest: _Optional[str] = ..., inventory: _Optional[str] = ..., record_path: _Optional[str] = ...) -> None: ...

class Execution(_message.Message):
    __slots__ = ("device", "provider", "precision", "detail", "reason")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    device: str
    provider: str
    precision: str
    detail: str
    reason: str
    def __init__(self, device: _Optional[str] = ..., provider: _Optional[str] = ..., precision: _Optional[str] = ..., detail: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Loaded(_message.Message):
    __slots__ = ("inputs", "edge_inputs", "outputs", "edge_outputs", "max_batch_size", "execution", "load_ns", "warmup_ns", "resident_bytes", "runtime", "streams")
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    EDGE_INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    EDGE_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    EXECUTION_FIELD_NUMBER: _ClassVar[int]
    LOAD_NS_FIELD_NUMBER: _ClassVar[int]
    WARMUP_NS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    edge_inputs: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    outputs: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    edge_outputs: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    max_batch_size: int
    execution: Execution
    load_ns: int
    warmup_ns: int
    resident_bytes: int
    runtime: str
    streams: int
    def __init__(self, inputs: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., edge_inputs: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., outputs: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., edge_outputs: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., max_batch_size: _Optional[int] = ..., execution: _Optional[_Union[Execution, _Mapping]] = ..., load_ns: _Optional[int] = ..., warmup_ns: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., runtime: _Optional[str] = ..., streams: _Optional[int] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("kind", "message")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
