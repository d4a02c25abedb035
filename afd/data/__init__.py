"""Videos in and out, the shard format, and the batches of a run. The only package that imports `streaming`."""
