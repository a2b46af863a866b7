"""The YAML file: schema, loading with origins, cross-field checks."""
