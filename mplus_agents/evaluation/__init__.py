"""Experiments that measure what an M+ remembers: retention, the retriever's recall, and questions on real contexts."""
