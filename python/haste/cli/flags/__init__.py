"""The flags of each subcommand, as a dataclass `Args`: what --help and a mistyped flag need, and nothing more.

These modules import no torch, nor anything else that takes long: flags are read and checked in a moment, and only then
the subcommand itself is imported. `Args.check()` raises UserError for values that cannot work; where flags stand for
others, `Args.resolved()` has those in their place.
"""
