// Row statistics of a linear head without its logits: the product runs in panels of V over many
// rows at once, and each panel is folded into the sums of its rows while it is in cache.
#pragma once

#include "../row_args.h"
#include "gemm.h"

namespace pyoffline {

// rows.logits and rows.dlogits are not read; rows.logits_type is what a logit is rounded to. MKL
// multiplies at most block_rows rows at a time, the tile kernel all of them. Throws where the
// vendor GEMM is missing.
void score_rows(const Matrix& hidden, const Matrix& weight, const RowArgs& rows,
                int64_t block_rows);

}  // namespace pyoffline
