"""Read and write files: writes are atomic, and reads validate their input.

- Any file: `file` writes, `read` and `yaml` read, `digest` hashes.
- Weights: `weights` in a file or folder, `deferred` until they are needed; `hub` and `trained` name where to get some.
- Data: `table` is a cache on disk, `audit` checks it, `source` gives batches.
- `picture` writes samples as images.

Touches the disk. Knows no run.
"""
