"""Addresses of stores, which may have passwords in them."""


class InvalidAddress(ValueError):  # noqa: N818 - says what the address is
    """A driver cannot read an address. What it says of it quotes a part, perhaps of the password; this does not."""

    def __init__(self) -> None:
        super().__init__("its address is not valid")
