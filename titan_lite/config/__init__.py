"""The configuration of a run: schema, loading, rules, parallel dimensions. Never imports torch."""
