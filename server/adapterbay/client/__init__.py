"""A typed client of an adapterbay server, synchronous and asyncio. Needs grpc and protobuf only, never torch.

with Client("127.0.0.1:50051") as client:
    print(client.classify(["a delight"], adapter="sentiment@champion")[0].label)
    for piece in client.generate_stream("Once upon", adapter="tales", max_tokens=50):
        print(piece.text, end="")
"""

from adapterbay.client.aio import AsyncClient
from adapterbay.client.errors import (
    AbortedError,
    CallCancelledError,
    ClientClosedError,
    ClientError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    RequestError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)
from adapterbay.client.fusion import Fusion, WeightedAdapter
from adapterbay.client.retry import RetryPolicy
from adapterbay.client.selection import Selection
from adapterbay.client.sync import Client
from adapterbay.client.types import (
    AdapterChange,
    AdapterInfo,
    AdapterPage,
    AdapterUse,
    AliasInfo,
    Classification,
    Classifications,
    ComparisonAnswer,
    Embeddings,
    EmbeddingVector,
    FusionUse,
    Generation,
    GenerationPiece,
    LabelScore,
    LoadedAdapter,
    PositionLogProbabilities,
    Provenance,
    Timings,
    TokenClassification,
    TokenClassifications,
    TokenLabel,
    TokenLogProbability,
    UnloadedAdapter,
)

__all__ = [
    "AbortedError",
    "AdapterChange",
    "AdapterInfo",
    "AdapterPage",
    "AdapterUse",
    "AliasInfo",
    "AsyncClient",
    "CallCancelledError",
    "Classification",
    "Classifications",
    "Client",
    "ClientClosedError",
    "ClientError",
    "ComparisonAnswer",
    "DeadlineExceededError",
    "EmbeddingVector",
    "Embeddings",
    "FailedPreconditionError",
    "Fusion",
    "FusionUse",
    "Generation",
    "GenerationPiece",
    "InternalError",
    "InvalidArgumentError",
    "LabelScore",
    "LoadedAdapter",
    "NotFoundError",
    "PositionLogProbabilities",
    "Provenance",
    "RequestError",
    "ResourceExhaustedError",
    "RetryPolicy",
    "Selection",
    "ServerError",
    "Timings",
    "TokenClassification",
    "TokenClassifications",
    "TokenLabel",
    "TokenLogProbability",
    "UnavailableError",
    "UnloadedAdapter",
    "WeightedAdapter",
]
