"""The DeepSpeed ZeRO-3 side: the only place that knows its internals."""
