"""Owns one ranking request from its message to its response: read, fetch, assemble, score, respond.

`ranker.Ranker.rank` lists these steps. Each step is one module and runs once per request.
"""
