"""PoSE in other trainers: a collator, a preflight callback, a plugin for Axolotl."""
