"""Read and write files: writes are atomic, and reads validate their input.

- Any file: `file` writes, `read` and `yaml` read, `digest` hashes.
- Weights: `tensor_files` reads them, `deferred` loads them on demand; `hub` and `run_places` locate them.
- Data: `table` is a cache on disk, `audit` checks it, `data_source` provides batches.
- `picture` writes samples as images.
"""
