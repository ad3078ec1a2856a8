"""How light a colour is."""

from matplotlib.colors import to_rgb


def compute_luminance(colour) -> float:
    """Relative luminance of an sRGB colour, from 0 (black) to 1 (white). WCAG 2.2."""
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour))
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
