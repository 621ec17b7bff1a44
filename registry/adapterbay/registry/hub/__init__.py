"""A registry on the Hub, or on any server that speaks its protocol: one repository per adapter, one commit per version.

    registry = HubRegistry("hub:acme")
    receipt = registry.push("out/sentiment", "sentiment", aliases=["champion"])      # acme/sentiment, tag v1
    folder = registry.pull("sentiment@champion", "sentiment-v1")

What is where: `names` (what may be asked for), `client` (requests), `failures` (errors in our words), `ledger` (which
commit is which version), `repository` (what a repository holds now), `resolution` (what a reference means), `fetch`
(checked files of a commit), `push` and `aliases` (the two writes), `checks` (verify and repair), `answers` (records and
events), `backend` (all of it together).
"""
