"""`skipwise extend`: all stages in order, and the choices that are made by measuring.

Reading order:  extend, stages, checks; choose_separator, choose_scaling, choose_temperature,
                choose_checkpoint
"""
