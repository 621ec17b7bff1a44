"""The gRPC services. They know the engine only through `ports`, and neither torch nor how a batch is made."""

from adapterbay.server.services.adapters import AdapterService
from adapterbay.server.services.inference import InferenceService

__all__ = ["AdapterService", "InferenceService"]
