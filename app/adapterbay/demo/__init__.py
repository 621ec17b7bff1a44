"""The whole product, end to end, on real weights and real text: `adapterbay demo`."""
