"""The HTTP edge: authenticates, reads, checks, records, answers. Imports neither torch nor transformers.

`app` holds the route table; one file a resource; `admission` is the one way into the queue, `waiters` the one way out.
"""
