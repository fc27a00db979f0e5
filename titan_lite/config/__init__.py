"""What a run is asked to do: schema, loading, rules, parallel dimensions. Never imports torch."""
