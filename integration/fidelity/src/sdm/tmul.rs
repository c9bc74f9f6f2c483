//! TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD, TDPBF16PS, TDPFP16PS, TCMMRLFP16PS and TCMMIMFP16PS (SDM vol. 2, the
//! operation of each).

/// Bytes from one row of a tile to the next one, in a component image.
pub const ROW: usize = 64;
/// Bytes of a tile.
pub const TILE: usize = 1024;

/// Rows and bytes per row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows.
    pub rows: usize,
    /// Bytes per row.
    pub columns: usize,
}

/// How the bytes of the two sources are extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signs {
    /// The first source has signed bytes.
    pub first: bool,
    /// The second source has signed bytes.
    pub second: bool,
}

/// A tile of which only what `shape` has counts: what write_row_and_zero and zero_upper_rows leave.
#[must_use]
pub fn shaped(tile: &[u8], shape: Shape) -> Vec<u8> {
    let mut result = vec![0; TILE];
    for row in 0..shape.rows {
        let at = row * ROW;
        result[at..][..shape.columns].copy_from_slice(&tile[at..][..shape.columns]);
    }
    result
}

fn dword(tile: &[u8], row: usize, column: usize) -> [u8; 4] {
    tile[row * ROW + column * 4..][..4].try_into().unwrap()
}

/// One accumulation: each element of `to` with all products of its row and column.
fn product(
    to: &[u8],
    shape: Shape,
    depth: usize,
    mut element: impl FnMut(usize, usize, [u8; 4], &mut dyn Iterator<Item = usize>) -> [u8; 4],
) -> Vec<u8> {
    let mut result = vec![0; TILE];
    for m in 0..shape.rows {
        for n in 0..shape.columns / 4 {
            let value = element(m, n, dword(to, m, n), &mut (0..depth));
            result[m * ROW + n * 4..][..4].copy_from_slice(&value);
        }
    }
    result
}

/// The destination after TDPB\[S|U\]\[S|U\]D. `depth` is how many rows the second source has.
#[must_use]
pub fn bytes(
    signs: Signs,
    to: &[u8],
    shape: Shape,
    first: &[u8],
    second: &[u8],
    depth: usize,
) -> Vec<u8> {
    let extend = |byte: u8, signed: bool| {
        if signed {
            i32::from(byte.cast_signed())
        } else {
            i32::from(byte)
        }
    };
    product(to, shape, depth, |m, n, old, ks| {
        let sum = ks.fold(i32::from_le_bytes(old), |sum, k| {
            let pairs = dword(first, m, k).into_iter().zip(dword(second, k, n));
            pairs.fold(sum, |sum, (x, y)| {
                sum.wrapping_add(extend(x, signs.first) * extend(y, signs.second))
            })
        });
        sum.to_le_bytes()
    })
}

/// What one step adds to the two sums of an element: two factors each.
type Factors = fn([f32; 2], [f32; 2]) -> [[f32; 2]; 2];

/// The destination after a product of halves: two sums, each step fused, rounded to nearest even, denormals
/// of floats taken as zero and flushed to zero.
fn halves(
    convert: fn([u8; 2]) -> f32,
    factors: Factors,
    to: &[u8],
    shape: Shape,
    [first, second]: [&[u8]; 2],
    depth: usize,
) -> Vec<u8> {
    let pair = |[a, b, c, d]: [u8; 4]| [convert([a, b]), convert([c, d])];
    product(to, shape, depth, |m, n, old, ks| {
        let mut sums = [0.0_f32; 2];
        for k in ks {
            let factors = factors(pair(dword(first, m, k)), pair(dword(second, k, n)));
            for (sum, [x, y]) in sums.iter_mut().zip(factors) {
                *sum = flush(x.mul_add(y, *sum));
            }
        }
        let sum = flush(sums[0] + sums[1]);
        flush(flush(f32::from_le_bytes(old)) + sum).to_le_bytes()
    })
}

/// Even by even and odd by odd.
fn pairwise(x: [f32; 2], y: [f32; 2]) -> [[f32; 2]; 2] {
    [[x[0], y[0]], [x[1], y[1]]]
}

/// The destination after TDPBF16PS. Denormals among the sources are taken as zero.
#[must_use]
pub fn bf16(to: &[u8], shape: Shape, first: &[u8], second: &[u8], depth: usize) -> Vec<u8> {
    halves(from_bf16, pairwise, to, shape, [first, second], depth)
}

/// The destination after TDPFP16PS. Denormals among the sources count.
#[must_use]
pub fn fp16(to: &[u8], shape: Shape, first: &[u8], second: &[u8], depth: usize) -> Vec<u8> {
    halves(from_fp16, pairwise, to, shape, [first, second], depth)
}

/// The destination after TCMMRLFP16PS: the real parts of products of complex numbers. Denormals among the
/// sources count.
#[must_use]
pub fn real(to: &[u8], shape: Shape, first: &[u8], second: &[u8], depth: usize) -> Vec<u8> {
    let factors: Factors = |x, y| [[x[0], y[0]], [-x[1], y[1]]];
    halves(from_fp16, factors, to, shape, [first, second], depth)
}

/// The destination after TCMMIMFP16PS: the imaginary parts.
#[must_use]
pub fn imaginary(to: &[u8], shape: Shape, first: &[u8], second: &[u8], depth: usize) -> Vec<u8> {
    let factors: Factors = |x, y| [[x[0], y[1]], [x[1], y[0]]];
    halves(from_fp16, factors, to, shape, [first, second], depth)
}

fn from_bf16([low, high]: [u8; 2]) -> f32 {
    flush(f32::from_le_bytes([0, 0, low, high]))
}

/// Exact: every half-precision number is a normal float.
fn from_fp16(bytes: [u8; 2]) -> f32 {
    let bits = u16::from_le_bytes(bytes);
    let (exponent, fraction) = (bits >> 10 & 0x1f, u32::from(bits & 0x3ff));
    let size = match exponent {
        0 => fraction as f32 / 16_777_216.0,
        0x1f => f32::from_bits(0x7f80_0000 | fraction << 13),
        _ => f32::from_bits((u32::from(exponent) + 112) << 23 | fraction << 13),
    };
    if bits >> 15 == 0 { size } else { -size }
}

fn flush(value: f32) -> f32 {
    if value.is_subnormal() {
        0_f32.copysign(value)
    } else {
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_extended_by_their_signs() {
        let shape = Shape {
            rows: 1,
            columns: 4,
        };
        let (mut x, mut y) = (vec![0; TILE], vec![0; TILE]);
        (x[0], y[0]) = (0xff, 2);
        let result = |first, second| {
            let tile = bytes(Signs { first, second }, &vec![0; TILE], shape, &x, &y, 1);
            i32::from_le_bytes(tile[..4].try_into().unwrap())
        };
        assert_eq!((result(true, false), result(false, true)), (-2, 510));
    }

    #[test]
    fn halves_are_multiplied_as_floats() {
        let shape = Shape {
            rows: 1,
            columns: 4,
        };
        let (mut x, mut y) = (vec![0; TILE], vec![0; TILE]);
        // 2.0 and 3.0 in the odd half.
        x[2..4].copy_from_slice(&0x4000_u16.to_le_bytes());
        y[2..4].copy_from_slice(&0x4040_u16.to_le_bytes());
        let tile = bf16(&vec![0; TILE], shape, &x, &y, 1);
        assert_eq!(tile[..4], 6_f32.to_le_bytes());
    }

    #[test]
    fn half_precision_is_converted_exactly() {
        for (bits, value) in [
            (0x3c00_u16, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0400, 6.103_515_6e-5),
            (0x0001, 5.960_464_5e-8),
            (0x83ff, -6.097_555e-5),
            (0x7c00, f32::INFINITY),
        ] {
            assert_eq!(from_fp16(bits.to_le_bytes()), value, "{bits:04x}");
        }
        assert!(from_fp16([0x01, 0x7c]).is_nan());
    }

    #[test]
    fn complex_numbers_are_multiplied() {
        let shape = Shape {
            rows: 1,
            columns: 4,
        };
        let number = |real: u16, imaginary: u16| {
            let mut tile = vec![0; TILE];
            tile[..2].copy_from_slice(&real.to_le_bytes());
            tile[2..4].copy_from_slice(&imaginary.to_le_bytes());
            tile
        };
        // (1 + 2i) (3 + 4i) = -5 + 10i
        let (x, y) = (number(0x3c00, 0x4000), number(0x4200, 0x4400));
        let zero = vec![0; TILE];
        assert_eq!(real(&zero, shape, &x, &y, 1)[..4], (-5_f32).to_le_bytes());
        assert_eq!(
            imaginary(&zero, shape, &x, &y, 1)[..4],
            10_f32.to_le_bytes()
        );
    }
}
