"""The colours of the page and its figures, light and dark."""

# The arms' colours stay apart from each other, in light mode, for readers without red, green or blue receptors too.
LIGHT = {
    **{"paper": "#fdfdfc", "raised": "#ffffff", "ink": "#1c1d1f", "muted": "#5c6066", "rule": "#dfe1e4"},
    **{"tint": "#f3f4f5", "baseline": "#6a6f76"},
    **{"arm-0": "#086abf", "arm-1": "#f2501d", "arm-2": "#16a375", "arm-3": "#8e2c86", "arm-4": "#8e992d"},
    **{"arm-5": "#241e74", "arm-6": "#b3263a"},
}
DARK = {
    **{"paper": "#15171a", "raised": "#1f2226", "ink": "#e8e9ea", "muted": "#a3a8af", "rule": "#34383e"},
    **{"tint": "#1d2024", "baseline": "#a8adb5"},
    **{"arm-0": "#5eb1f2", "arm-1": "#ff8f63", "arm-2": "#45c9a2", "arm-3": "#dd8fd0", "arm-4": "#ced36a"},
    **{"arm-5": "#a9a5ff", "arm-6": "#f56f84"},
}
