"""Other libraries' output, kept off the terminal."""


def hide_loading_bars() -> None:
    """No progress bars for reading weights, which would break into the run's own line."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
