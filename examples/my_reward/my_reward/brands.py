"""A reward that is a class: it prepares what it needs once, then scores whole tables of groups."""

from rewards.group import Groups, TitleCatalog


class SameBrand:
    """`bonus` for a candidate of the target's brand; `known` times that if the user has bought the brand before.

    A title's brand is its first word.
    """

    def __init__(self, catalog: TitleCatalog, bonus: float = 1.0, known: float = 0.5) -> None:
        self.bonus = bonus
        self.known = known
        titles = [catalog.title(item_class) for item_class in range(catalog.num_classes)]
        self.brand = [title.split()[0].lower() for title in titles]

    def __call__(self, groups: Groups) -> list[list[float]]:
        rewards = []
        for group in groups:
            wanted = self.brand[group.target_class]
            bought = wanted in {self.brand[item_class] for item_class in group.history_classes}
            value = self.bonus * (self.known if bought else 1.0)
            same = [item_class >= 0 and self.brand[item_class] == wanted for item_class in group.candidate_classes]
            rewards.append([value if found else 0.0 for found in same])
        return rewards
