"""The worker process: the only place that knows both rows and tensors. It never speaks HTTP."""
