"""Titles that read like a shop's: brand, product, kind, size and pack, with shared prefixes as real titles have."""

from dataclasses import dataclass

import numpy as np

TITLES_PER_FAMILY = 6
"""Wanted mean number of titles that share brand and product; more once all families are in use."""


@dataclass(frozen=True)
class Department:
    """The words of one department; a title takes one of each."""

    brands: tuple[str, ...]
    products: tuple[str, ...]
    kinds: tuple[str, ...]
    sizes: tuple[str, ...]
    packs: tuple[str, ...]


DEPARTMENTS = (
    Department(
        ("Hillcrest", "Boltmark", "Ironside", "Fastwell", "Tarn & Sons"),
        ("Hex Bolt", "Wood Screw", "Lock Washer", "Wing Nut", "Threaded Rod", "Carriage Bolt"),
        ("Zinc Plated", "Stainless Steel", "Black Oxide", "Brass", "Galvanized", "Nylon"),
        ('1/4" x 1"', '1/4" x 2"', '3/8" x 1"', '3/8" x 2"', '1/2" x 3"', "M6 x 20 mm"),
        ("", "Pack of 10", "Pack of 25", "Pack of 100"),
    ),
    Department(
        ("Gritline", "Sandhurst", "Norwick", "Keenedge", "Abrasco"),
        ("Sanding Disc", "Flap Wheel", "Cut-Off Wheel", "Sanding Belt", "Wire Brush", "Grinding Stone"),
        ("Aluminum Oxide", "Silicon Carbide", "Ceramic", "Zirconia", "Garnet", "Diamond"),
        ("60 Grit", "80 Grit", "120 Grit", "220 Grit", "400 Grit", "1000 Grit"),
        ("", "5 Inch", "Box of 50", "Pack of 5"),
    ),
    Department(
        ("Bondwright", "Stickwell", "Holdfast", "Gluetec", "Sealmaster"),
        ("Epoxy Adhesive", "Wood Glue", "Silicone Sealant", "Thread Locker", "Duct Tape", "Contact Cement"),
        ("Clear", "White", "Heavy Duty", "Quick Set", "Waterproof", "High Temperature"),
        ("1 oz", "4 oz", "8 fl. oz", "10.1 oz", "1 Quart", "1 Gallon"),
        ("", "2-Pack", "Case of 12", "with Nozzle"),
    ),
    Department(
        ("Voltara", "Ampere & Co", "Circuitry", "Brightwire", "Relaytec"),
        ("Hookup Wire", "Toggle Switch", "Power Relay", "Heat Shrink Tube", "Terminal Block", "Cable Tie"),
        ("Red", "Black", "Blue", "12V DC", "24V DC", "UL Listed"),
        ("22 AWG", "18 AWG", "14 AWG", "10 Amp", "20 Amp", "8 inch"),
        ("", "100 ft Spool", "Pack of 10", "Assortment Kit"),
    ),
    Department(
        ("Flowell", "Pipewright", "Aquaduct", "Brooks", "Tideline"),
        ("Tube Fitting", "Ball Valve", "Hose Clamp", "Pipe Elbow", "Garden Hose", "Check Valve"),
        ("Brass", "PVC", "Polypropylene", "Stainless Steel", "Copper", "Push-to-Connect"),
        ('1/8" NPT', '1/4" NPT', '3/8" Barbed', '1/2" NPT', '3/4" NPT', "15 mm"),
        ("", "Pack of 2", "Pack of 5", "Pack of 10"),
    ),
    Department(
        ("Guardwell", "Safehaven", "Northgate", "Visera", "Steadfast"),
        ("Nitrile Gloves", "Safety Glasses", "Ear Plugs", "Dust Mask", "Hard Hat", "Work Vest"),
        ("Blue", "Clear", "Orange", "Powder Free", "Anti-Fog", "Cut Resistant"),
        ("Small", "Medium", "Large", "X-Large", "XX-Large", "One Size"),
        ("", "Box of 100", "Pair", "Pack of 12"),
    ),
    Department(
        ("Truemark", "Calibra", "Levelton", "Gaugeworks", "Preciso"),
        ("Digital Caliper", "Steel Ruler", "Torque Wrench", "Feeler Gauge", "Dial Indicator", "Tape Measure"),
        ("Stainless Steel", "Metric", "Inch/Metric", "Magnetic", "Hardened", "Carbon Fiber"),
        ("0-6 inch", "0-12 inch", "150 mm", "300 mm", "25 ft", "0.001 inch"),
        ("", "with Case", "Set of 2", "Certified"),
    ),
    Department(
        ("Labrook", "Helix Supply", "Purelane", "Kelvin Bros", "Glassmere"),
        ("Glass Beaker", "Test Tube", "Pipette Tip", "Petri Dish", "Filter Paper", "Sample Vial"),
        ("Borosilicate", "Polystyrene", "Sterile", "Graduated", "Amber", "Autoclavable"),
        ("10 mL", "50 mL", "100 mL", "250 mL", "500 mL", "1000 mL"),
        ("", "Pack of 6", "Rack of 96", "Case of 500"),
    ),
)


@dataclass(frozen=True)
class Titles:
    """Distinct titles and how they belong together, from the widest to the narrowest group."""

    text: list[str]
    """[n]"""
    department: np.ndarray
    """int64 [n]: row of DEPARTMENTS."""
    brand: np.ndarray
    """int64 [n]: brand within the whole catalogue."""
    family: np.ndarray
    """int64 [n]: brand and product within the whole catalogue."""


def product_titles(count: int, draw: np.random.Generator) -> Titles:
    """`count` distinct titles, at least one per department, spread evenly over families, in random order."""
    brands, products = len(DEPARTMENTS[0].brands), len(DEPARTMENTS[0].products)
    families = np.arange(len(DEPARTMENTS) * brands * products).reshape(len(DEPARTMENTS), -1)
    one_of_each_department_in_turn = draw.permuted(families, axis=1).T.ravel()
    used = one_of_each_department_in_turn[: max(len(DEPARTMENTS), count // TITLES_PER_FAMILY)]
    family = draw.permutation(used[np.arange(count) % len(used)])
    variants = np.empty(count, np.int64)
    for members in np.split(
        np.argsort(family, kind="stable"), np.cumsum(np.unique(family, return_counts=True)[1])[:-1]
    ):
        series = -(-2 * len(members) // _combinations())
        variants[members] = draw.permutation(series * _combinations())[: len(members)]
    return Titles(
        text=[_title(f, v) for f, v in zip(family.tolist(), variants.tolist(), strict=True)],
        department=family // (brands * products),
        brand=family // products,
        family=family,
    )


def _combinations() -> int:
    words = DEPARTMENTS[0]
    return len(words.kinds) * len(words.sizes) * len(words.packs)


def _title(family: int, variant: int) -> str:
    brand, product = divmod(family, len(DEPARTMENTS[0].products))
    words = DEPARTMENTS[brand // len(DEPARTMENTS[0].brands)]
    series, variant = divmod(variant, _combinations())
    variant, pack = divmod(variant, len(words.packs))
    kind, size = divmod(variant, len(words.sizes))
    name = f"{words.brands[brand % len(words.brands)]} {words.products[product]}"
    parts = [
        f"{name} Series {series + 1}" if series else name,
        words.kinds[kind],
        words.sizes[size],
        words.packs[pack],
    ]
    return ", ".join(part for part in parts if part)
