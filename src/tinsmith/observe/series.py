"""Every series of `/metrics`: its name, what it means, its labels. The page docs/how-to/observe.md lists the same.

Names follow Prometheus: `tinsmith_` before, the unit at the end, `_total` after counters. `Series` and `ReadCounter`
are read from rows, files and the system when somebody asks; all others are counted where it happens.
"""

from __future__ import annotations

from tinsmith.observe.metrics import Counter, Gauge, Histogram, ReadCounter, Series

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
DISK_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
TOKEN_COUNTS = (64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0)

# HTTP, counted in the API
HTTP_REQUESTS = Counter("tinsmith_http_requests_total", "HTTP requests answered.", "route", "status")
HTTP_SECONDS = Histogram(
    "tinsmith_http_request_seconds", "From an HTTP request's header to its answer; polls wait on purpose.", "route",
    buckets=SECONDS,
)  # fmt: skip
REFUSED = Counter("tinsmith_refused_requests_total", "HTTP requests answered with an error, by its code.", "code")

# Requests of runs and samplers, counted where their outcomes are recorded
OPS = Counter(
    "tinsmith_ops_total", "Requests that came to their end: done, failed, refused (at arrival) or cancelled.",
    "kind", "outcome",
)  # fmt: skip
FAILED_OPS = Counter(
    "tinsmith_failed_ops_total", "Requests that failed, by the code of the error.", "code", first=("internal",)
)
OP_SECONDS = Histogram(
    "tinsmith_op_seconds", "From a request's acknowledgement until its result is recorded.", "kind", buckets=SECONDS
)
QUEUE_WAIT = Histogram(
    "tinsmith_queue_wait_seconds", "From a request's acknowledgement until a worker takes it.", "kind", buckets=SECONDS
)
TENANT_WAIT = Histogram("tinsmith_tenant_queue_wait_seconds", "The same for each tenant.", "tenant", buckets=SECONDS)
TOKENS = Counter("tinsmith_tokens_total", "Tokens: trained, prefilled, cached (prefilled before) or sampled.", "kind")
TENANT_TOKENS = Counter("tinsmith_tenant_tokens_total", "The same for each tenant.", "tenant", "kind")

# Computing, counted in workers
PASS_SECONDS = Histogram("tinsmith_pass_seconds", "Computing of one training pass.", buckets=SECONDS)
PASS_RUNS = Histogram("tinsmith_pass_runs", "Runs that share a training pass.", buckets=COUNTS)
PASS_TENANTS = Histogram("tinsmith_pass_tenants", "Tenants that share a training pass.", buckets=COUNTS)
PASS_TOKENS = Histogram("tinsmith_pass_tokens", "Tokens of a training pass.", buckets=TOKEN_COUNTS)
OPTIM_SECONDS = Histogram(
    "tinsmith_optim_seconds", "Computing of optimizer steps, those of several runs at once counted once.",
    buckets=SECONDS,
)  # fmt: skip
SAMPLE_FIRST = Histogram(
    "tinsmith_sample_first_token_seconds", "From a sample's acknowledgement until its first token.", buckets=SECONDS
)
SAMPLE_STEP = Histogram(
    "tinsmith_sample_step_seconds", "One step of the sampler: each resident sequence gets a token.", buckets=SECONDS
)
WORKER_BUSY = Counter("tinsmith_worker_busy_seconds_total", "Time in which a worker computed.", "worker")
BASE_READ = Gauge("tinsmith_base_read_ratio", "How much of its base's weights a worker has read, 0 to 1.", "worker")
BASE_BYTES = Gauge("tinsmith_base_bytes", "Memory that the matrices of a worker's base take.", "worker")
KV_USED = Gauge("tinsmith_kv_used_bytes", "Memory for keys and values that samples hold.", "worker")
KV_FREE = Gauge("tinsmith_kv_free_bytes", "Memory for keys and values that is free.", "worker")
RESIDENT_RUNS = Gauge("tinsmith_resident_runs", "Runs in the memory where passes are computed.", "worker")
RESIDENT_RUN_BYTES = Gauge("tinsmith_resident_runs_bytes", "What these runs take of it.", "worker")
MAX_RUNS = Gauge("tinsmith_resident_runs_max", "Runs that may be there at most.", "worker")
MAX_RUN_BYTES = Gauge(
    "tinsmith_resident_runs_max_bytes", "What they may take at most; a single run may more.", "worker"
)
RESIDENT_SAMPLES = Gauge("tinsmith_resident_samples", "Sample requests in the engine.", "worker")
SEATED = Gauge("tinsmith_seated_sequences", "Sequences of these requests that are decoded together.", "worker")
SEATS = Gauge("tinsmith_sample_seats", "Sequences that can be decoded together.", "worker")

# Durability
SNAPSHOT_SECONDS = Histogram(
    "tinsmith_snapshot_seconds", "Writing and recording a run's snapshot, beside the passes.", buckets=SECONDS
)
SNAPSHOT_BYTES = Counter("tinsmith_snapshot_written_bytes_total", "Bytes of snapshots written.")
SNAPSHOT_FAILURES = Counter("tinsmith_snapshot_failures_total", "Snapshots that could not be written; the log is kept.")
REPLAYED = Counter("tinsmith_replayed_ops_total", "Requests computed again after a worker's end.", "kind")
DAMAGED = Counter(
    "tinsmith_damaged_snapshots_total",
    "Snapshots that were found damaged or gone, and whose runs went on from the one before or from their log.",
)
CORRUPTED = Counter("tinsmith_corrupted_runs_total", "Runs given up because their log or files were damaged.")
LET_GO = Counter("tinsmith_let_go_runs_total", "Runs deleted by their owners, or let go for their age.", "why")
LET_GO_BYTES = Counter("tinsmith_let_go_snapshot_bytes_total", "Bytes of these runs' snapshots.")
TRIMMED = Counter(
    "tinsmith_trimmed_rows_total",
    "Entries of the audit log that were deleted for their age, and rows of usage moved from hours into days.",
    "kind",
)  # fmt: skip
FSYNC = Histogram("tinsmith_fsync_seconds", "Putting a stored file on disk.", buckets=DISK_SECONDS)
COMMIT = Histogram(
    "tinsmith_commit_seconds", "Committing a durable transaction, its fsync included.", buckets=DISK_SECONDS
)

# Read when they are asked for
INFO = Series("tinsmith_info", "Always 1; its labels say what is served.", "version")
QUEUED_OPS = Series("tinsmith_queued_ops", "Requests that wait for a worker.", "kind")
RUNNING_OPS = Series("tinsmith_running_ops", "Requests that a worker has taken.", "kind")
QUEUE_DEPTH = Series("tinsmith_queue_depth", "Requests of a tenant that wait.", "tenant")
QUEUE_OLDEST = Series(
    "tinsmith_queue_oldest_seconds", "How long a tenant's oldest waiting request has waited.", "tenant"
)
QUEUE_OLDEST_FREE = Series(
    "tinsmith_queue_oldest_free_seconds",
    "How long a tenant's oldest waiting request has waited of those that no quota holds back, nor one before it in its "
    "run; 0 where quotas hold back all.",
    "tenant",
)
HELD_OPS = Series("tinsmith_held_ops", "Those of a tenant's waiting requests that its quotas hold back.", "tenant")
OPEN_POLLS = Series("tinsmith_open_polls", "Polls that wait for a result.")
SESSIONS = Series("tinsmith_sessions", "Sessions that have not ended.")
RUNS = Series("tinsmith_runs", "Runs, by their status.", "status")
SNAPSHOTS = Series("tinsmith_snapshots", "Runs with a snapshot on disk.")
SNAPSHOTS_SIZE = Series("tinsmith_snapshots_bytes", "What these snapshots take.")
CHECKPOINTS = Series("tinsmith_checkpoints", "Checkpoints, by kind.", "kind")
CHECKPOINTS_SIZE = Series("tinsmith_checkpoints_bytes", "What they take.", "kind")
WORKER_READY = Series(
    "tinsmith_worker_ready",
    "1 while a worker has its base loaded, 0 also while it is dead.",
    "worker",
    "base_model",
    "role",
)
RESTARTS = ReadCounter("tinsmith_restarts_total", "Restarts of a process that had died.", "process")
SUPERVISOR_SILENT = Series(
    "tinsmith_supervisor_silent_seconds",
    "Since `tinsmith serve` last showed that it lives, which it does every second.",
)
PROCESS_MEMORY = Series("tinsmith_process_memory_bytes", "Resident memory of a process.", "process")
PROCESS_CPU = ReadCounter("tinsmith_process_cpu_seconds_total", "Processor time of a process.", "process")
DISK_USED = Series("tinsmith_disk_used_bytes", "What the data directory takes, by kind.", "kind")
DISK_FREE = Series("tinsmith_disk_free_bytes", "What is free where the data directory is.")

TABLE: tuple[Series, ...] = tuple(value for value in list(vars().values()) if isinstance(value, Series))
