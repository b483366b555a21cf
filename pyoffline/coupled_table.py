"""THE TABLE of coupled objectives, by number: rows of sequence and group objectives, of preference
objectives, and the masks that wrap other terms.

A program names a row by its number, as it names token-local rows (`objectives.TABLE`). Not here:
any maths.
"""

from pyoffline.coupled import CoupledRow
from pyoffline.group_math import GROUP_ROWS
from pyoffline.preference_rows import PREFERENCE_ROWS
from pyoffline.sequence_math import MASK_ROWS, SEQUENCE_ROWS

COUPLED: dict[str, CoupledRow] = {
    row.name: row for row in (*SEQUENCE_ROWS, *GROUP_ROWS, *PREFERENCE_ROWS)
}
# A mask is followed by the terms that it wraps; their number stands in its anchor.
MASKS: dict[str, CoupledRow] = {row.name: row for row in MASK_ROWS}
COUPLED_OF_CODE = {row.code: row for row in (*COUPLED.values(), *MASKS.values())}
