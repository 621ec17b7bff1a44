"""Modules of the base that many adapters share: one base computation, and for each token what its own adapters change.

`pools` hold what is resident, `plan` says which token of a step uses what, and the wrapped modules (`linear`, `norm`,
`table`) apply it. All of it runs on the engine's thread only.
"""
