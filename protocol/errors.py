"""Every error that a user or a peer can meet, as one tree with stable codes.

    ExpertdError                      internal
    |-- CheckpointError               checkpoint_invalid
    |   |-- NotACheckpoint            not_a_checkpoint
    |   |-- ConfigMissing             config_missing
    |   |-- UnknownFamily             unknown_family
    |   |-- DenseModel                dense_model
    |   |-- CheckpointTruncated       checkpoint_truncated
    |   |-- HeaderInvalid             header_invalid
    |   |-- DerivedExperts            derived_experts
    |   |-- FileChanged               file_changed
    |   |-- ModelNotHere              model_not_here
    |   |-- ModelIncomplete           model_incomplete
    |   `-- ModelAmbiguous            model_ambiguous
    |-- HubError                      hub_failed
    |   |-- HubUnreachable            hub_unreachable
    |   |-- HubRefused                hub_refused
    |   `-- HubNotFound               hub_not_found
    |-- DiskFull                      disk_full
    |-- BudgetTooSmall                budget_too_small
    |-- SizeInvalid                   size_invalid
    |-- ConfigInvalid                 config_invalid
    |   `-- KeyFileInvalid            key_file_invalid
    |-- SegmentFailed                 segment_failed
    |-- HomeError                     home_invalid
    |   `-- HomeTooLong               home_too_long
    |-- PathInvalid                   path_invalid
    |-- DaemonNotRunning              daemon_not_running
    |   `-- DaemonLost                daemon_lost
    |-- DaemonAlreadyRunning          daemon_already_running
    |-- DaemonBusy                    daemon_busy
    |-- DaemonStartFailed             daemon_start_failed
    |-- ProtocolMismatch              protocol_mismatch
    |-- MessageInvalid                message_invalid
    |-- FetchInvalid                  fetch_invalid
    |-- ReadFailed                    read_failed
    |-- PoolMoved                     pool_moved
    |-- LimitReached                  limit_reached
    |-- SessionUnknown                session_unknown
    |-- SessionClosed                 session_closed
    |-- AliasFailed                   alias_failed
    |-- KvBitsUnsupported             kv_bits_unsupported
    |-- TraceInvalid                  trace_invalid
    |-- TraceWriteFailed              trace_write_failed
    |-- ProfileInvalid                profile_invalid
    |   `-- ProfileNotFound           profile_not_found
    |-- StoreInvalid                  store_invalid
    |-- PackFailed                    pack_failed
    |-- PackRunning                   pack_running
    |-- PortInUse                     port_in_use
    |-- ServiceFailed                 service_failed
    |   |-- ServiceManagerMissing     service_manager_missing
    |   `-- ServiceNotInstalled       service_not_installed
    |-- RequestInvalid                request_invalid
    |   |-- KeyInvalid                invalid_api_key
    |   |-- ParameterUnsupported      parameter_unsupported
    |   |-- ModelNotFound             model_not_found
    |   |-- ResponseNotFound          response_not_found
    |   |-- RouteNotFound             route_not_found
    |   |-- MethodNotAllowed          method_not_allowed
    |   |-- ContextLengthExceeded     context_length_exceeded
    |   `-- RequestTooLarge           request_too_large
    |-- QueueFull                     queue_full
    |-- DeadlineExceeded              deadline_exceeded
    |-- MemoryPressure                memory_pressure
    |-- ModelInUse                    model_in_use
    |-- ModelNotLoaded                model_not_loaded
    |-- BlocksInvalid                 blocks_invalid
    `-- WorkerUnavailable             worker_unavailable

The code, not the class name, is what crosses a process boundary; ``from_code`` rebuilds the class on the other side.
The message is one sentence for the user: what happened, to what, and what to do next.
"""

from __future__ import annotations

EXIT_STATUSES = {
    0: "it did what it was asked to",
    1: "it failed in another way than those below; the sentence says how",
    2: "what it was given cannot be used: an argument, a setting, a size, a model's files, the home",
    3: "no daemon runs in this home, it has gone, or it did not come up",
    4: "there is not enough: memory, budget, sessions",
    5: "somebody else has it: the home, the port, the packed store",
    6: "the daemon is of another version",
    130: "Ctrl-C",
}
"""What a command ends with, and what that means; each class below has one of them."""


class ExpertdError(Exception):
    """Base of all errors.

    Attributes:
        code: stable machine-readable name.
        exit_status: what a command exits with.
        http_status: what the gateway answers with.
        retryable: whether the same request may succeed later without anybody changing anything.
        param: for HTTP, the request's field at fault.
    """

    code = "internal"
    exit_status = 1
    http_status = 500
    retryable = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class CheckpointError(ExpertdError):
    """A model's files cannot be used."""

    code = "checkpoint_invalid"
    exit_status = 2
    http_status = 400


class NotACheckpoint(CheckpointError):
    """The path is not a folder with safetensors files."""

    code = "not_a_checkpoint"


class ConfigMissing(CheckpointError):
    """``config.json`` is absent or cannot be read."""

    code = "config_missing"


class UnknownFamily(CheckpointError):
    """mlx-lm has no model of the type that the config names, or its class refuses the config."""

    code = "unknown_family"


class DenseModel(CheckpointError):
    """The model has no experts, so there is nothing to cache."""

    code = "dense_model"


class CheckpointTruncated(CheckpointError):
    """A file is shorter than its header says."""

    code = "checkpoint_truncated"


class HeaderInvalid(CheckpointError):
    """A safetensors header contradicts itself, the file, or the manifest."""

    code = "header_invalid"


class DerivedExperts(CheckpointError):
    """mlx-lm computes the experts at load (splits, transposes, dequantizes), and there is no packed store of them."""

    code = "derived_experts"


class FileChanged(CheckpointError):
    """A file is not the one that was indexed (size, time or inode differ)."""

    code = "file_changed"


class ModelNotHere(CheckpointError):
    """What the user called a model is neither a folder nor the name of a model on this machine."""

    code = "model_not_here"


class ModelIncomplete(CheckpointError):
    """A model is here, but some of its files are not."""

    code = "model_incomplete"


class ModelAmbiguous(CheckpointError):
    """Several models, or versions of one, are here by the name that the user gave."""

    code = "model_ambiguous"


class HubError(ExpertdError):
    """The model hub answered with something that does not help, or a download broke off."""

    code = "hub_failed"


class HubUnreachable(HubError):
    """The hub cannot be reached, or must not be asked (offline)."""

    code = "hub_unreachable"
    retryable = True


class HubRefused(HubError):
    """The hub wants to know who asks, or that person may not have the model."""

    code = "hub_refused"


class HubNotFound(HubError):
    """The hub has no such model, or no such revision of it, for whoever asks."""

    code = "hub_not_found"


class DiskFull(ExpertdError):
    """The disk has no room for what should be written."""

    code = "disk_full"


class BudgetTooSmall(ExpertdError):
    """The budget cannot hold what this model needs at least; the message names the smallest that works."""

    code = "budget_too_small"
    exit_status = 4
    http_status = 503


class SizeInvalid(ExpertdError):
    """A size that is not ``512MB``, ``2GiB`` or a number of bytes."""

    code = "size_invalid"
    exit_status = 2
    http_status = 400


class ConfigInvalid(ExpertdError):
    """A setting cannot be used: in ``config.toml``, a variable of the environment, or a flag."""

    code = "config_invalid"
    exit_status = 2


class KeyFileInvalid(ConfigInvalid):
    """The file of API keys cannot be read, others can read it, or it has no usable key."""

    code = "key_file_invalid"
    http_status = 503


class SegmentFailed(ExpertdError):
    """The system gave no shared memory."""

    code = "segment_failed"
    exit_status = 4
    http_status = 503
    retryable = True


class HomeError(ExpertdError):
    """EXPERTD_HOME cannot be used: not a folder, not ours, not writable, or not private."""

    code = "home_invalid"
    exit_status = 2


class HomeTooLong(HomeError):
    """A socket's path under EXPERTD_HOME would not fit the system's limit."""

    code = "home_too_long"


class PathInvalid(ExpertdError):
    """A path begins with ``~``, and there is no folder that this stands for."""

    code = "path_invalid"
    exit_status = 2
    http_status = 400


class DaemonNotRunning(ExpertdError):
    """No daemon answers in this home."""

    code = "daemon_not_running"
    exit_status = 3
    http_status = 503
    retryable = True


class DaemonLost(DaemonNotRunning):
    """The daemon went away while a session was attached."""

    code = "daemon_lost"


class DaemonAlreadyRunning(ExpertdError):
    """Another daemon owns this home."""

    code = "daemon_already_running"
    exit_status = 5


class DaemonBusy(ExpertdError):
    """The daemon was asked to end if nobody uses it, and somebody does."""

    code = "daemon_busy"


class DaemonStartFailed(ExpertdError):
    """A daemon was started on demand and did not come up."""

    code = "daemon_start_failed"
    exit_status = 3
    http_status = 503


class ProtocolMismatch(ExpertdError):
    """The peer speaks another version of the protocol."""

    code = "protocol_mismatch"
    exit_status = 6
    http_status = 503


class MessageInvalid(ExpertdError):
    """A message that the protocol does not allow."""

    code = "message_invalid"
    http_status = 400


class FetchInvalid(ExpertdError):
    """A Fetch names a layer or experts that the model does not have, or more than its pool can hold at once."""

    code = "fetch_invalid"


class ReadFailed(ExpertdError):
    """The system could not read a block from disk."""

    code = "read_failed"
    http_status = 503
    retryable = True


class PoolMoved(ExpertdError):
    """A Fetch names a generation that the layer's pool has left.  A worker follows by itself; users do not see this."""

    code = "pool_moved"
    http_status = 503
    retryable = True


class LimitReached(ExpertdError):
    """As many sessions, models or connections are open as the daemon takes; the message names the limit."""

    code = "limit_reached"
    exit_status = 4
    http_status = 503
    retryable = True


class SessionUnknown(ExpertdError):
    """The daemon does not know this session: it was detached, or another daemon granted it."""

    code = "session_unknown"
    http_status = 503
    retryable = True


class SessionClosed(ExpertdError):
    """The model was closed, or belongs to the process that this one was forked from."""

    code = "session_closed"


class AliasFailed(ExpertdError):
    """Shared pages could not be made into MLX arrays, and copying was not allowed."""

    code = "alias_failed"


class KvBitsUnsupported(ExpertdError):
    """The model's KV caches cannot be quantized."""

    code = "kv_bits_unsupported"
    exit_status = 2
    http_status = 400


class TraceInvalid(ExpertdError):
    """A file is no routing trace, is damaged, or is of a newer format; or a file of prompts cannot be used."""

    code = "trace_invalid"
    exit_status = 2


class TraceWriteFailed(ExpertdError):
    """A trace cannot be written: the disk is full, or something is in its place."""

    code = "trace_write_failed"


class ProfileInvalid(ExpertdError):
    """A profile, its name, or the file that one should be made of cannot be used."""

    code = "profile_invalid"
    exit_status = 2


class ProfileNotFound(ProfileInvalid):
    """No profile is called so."""

    code = "profile_not_found"


class StoreInvalid(ExpertdError):
    """A packed store is damaged, truncated, missing, or of another model or version."""

    code = "store_invalid"
    exit_status = 2


class PackFailed(ExpertdError):
    """A packed store cannot be written: no room, or the system does not let us."""

    code = "pack_failed"


class PackRunning(ExpertdError):
    """Another process is writing the same packed store."""

    code = "pack_running"
    exit_status = 5


class PortInUse(ExpertdError):
    """The gateway's address is taken."""

    code = "port_in_use"
    exit_status = 5


class ServiceFailed(ExpertdError):
    """The service could not be installed, changed or taken away; the message says which step failed and what helps."""

    code = "service_failed"


class ServiceManagerMissing(ServiceFailed):
    """Neither launchd nor a systemd user manager is there."""

    code = "service_manager_missing"
    exit_status = 2


class ServiceNotInstalled(ServiceFailed):
    """Something is asked of a service that this home does not have."""

    code = "service_not_installed"
    exit_status = 3


class RequestInvalid(ExpertdError):
    """An HTTP request that cannot be served as it is."""

    code = "request_invalid"
    http_status = 400


class KeyInvalid(RequestInvalid):
    """The gateway needs an API key, and the request has none or a wrong one.  The code is OpenAI's."""

    code = "invalid_api_key"
    http_status = 401


class ParameterUnsupported(RequestInvalid):
    """A parameter that this gateway does not honour (it never ignores one)."""

    code = "parameter_unsupported"


class ModelNotFound(RequestInvalid):
    """The request names a model that is not served here."""

    code = "model_not_found"
    http_status = 404


class ResponseNotFound(RequestInvalid):
    """No response of that id is kept, or none that has an item of that id."""

    code = "response_not_found"
    http_status = 404


class RouteNotFound(RequestInvalid):
    """No such path."""

    code = "route_not_found"
    http_status = 404


class MethodNotAllowed(RequestInvalid):
    """The path exists, the method does not."""

    code = "method_not_allowed"
    http_status = 405


class ContextLengthExceeded(RequestInvalid):
    """The prompt and its answer do not fit the model's context."""

    code = "context_length_exceeded"


class RequestTooLarge(RequestInvalid):
    """The HTTP body is larger than the gateway takes."""

    code = "request_too_large"
    http_status = 413


class QueueFull(ExpertdError):
    """As many requests wait as may wait."""

    code = "queue_full"
    http_status = 429
    retryable = True


class DeadlineExceeded(ExpertdError):
    """A request has taken longer than the gateway allows."""

    code = "deadline_exceeded"
    http_status = 504


class MemoryPressure(ExpertdError):
    """The machine is short of memory."""

    code = "memory_pressure"
    http_status = 503
    retryable = True


class ModelInUse(ExpertdError):
    """A model cannot be given back, because sessions use it."""

    code = "model_in_use"
    http_status = 409


class ModelNotLoaded(ExpertdError):
    """The daemon holds nothing of the model."""

    code = "model_not_loaded"
    http_status = 404


class BlocksInvalid(ExpertdError):
    """Blocks are named that the model does not have, or more are to be pinned than may be."""

    code = "blocks_invalid"
    http_status = 400


class WorkerUnavailable(ExpertdError):
    """The model's worker is starting, has failed or has died."""

    code = "worker_unavailable"
    http_status = 503
    retryable = True


def error_classes() -> dict[str, type[ExpertdError]]:
    """Every class of the tree by its code."""
    found: dict[str, type[ExpertdError]] = {}
    todo: list[type[ExpertdError]] = [ExpertdError]
    while todo:
        cls = todo.pop()
        found[cls.code] = cls
        todo.extend(cls.__subclasses__())
    return found


def from_code(code: str, message: str) -> ExpertdError:
    """The error that a peer sent.  A code that this version does not know becomes a plain ``ExpertdError``."""
    return error_classes().get(code, ExpertdError)(message)
