"""The tiles of the scoring product that the library takes on a chip, for tensors of the CPU: in the
place of `score_config` and `epilogue_config`, which would give the interpreter's.
"""

from pyoffline.kernels.configs import EPILOGUE_TILES, SCORE_TILES, score_family


def put(capability: int, module, patch=setattr):
    """Into `kernels.score_rows`; patch: `monkeypatch.setattr` where it must end with a test."""

    def score_tile(hidden, unit, plain=True):
        size = hidden.element_size()
        return SCORE_TILES[score_family(capability // 10, size, unit), size, plain]

    def epilogue_tile(hidden, unit, plain=True):
        return EPILOGUE_TILES[score_family(capability // 10, hidden.element_size(), unit), plain]

    patch(module, "score_config", score_tile)
    patch(module, "epilogue_config", epilogue_tile)
