"""Owns one ranking request from its message to its response: read, fetch, assemble, score, respond.

`ranker.Ranker.rank` lists these steps; each step is one module, which is entered once for a request.
"""
