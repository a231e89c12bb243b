"""One format: INT4 in blocks of 16 with float32 scales."""

from fewbit.quant.elements import F32, INT4
from fewbit.quant.spec import Format, spec

INT4_G16 = Format(spec(INT4, (F32, 1, 16), rule="range"))
