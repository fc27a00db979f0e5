"""Single-device model code: knows no rank and no mesh."""
