"""The one command, `adapterbay`, with every group; `registry`, `trainer` and `server` are its groups on their own."""
