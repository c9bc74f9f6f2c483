//! TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD and TDPBF16PS (SDM vol. 2, the operation of each).

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

/// The destination after TDPBF16PS: two sums, of the even and the odd elements, each step fused,
/// rounded to nearest even, denormals taken as zero and flushed to zero.
#[must_use]
pub fn bf16(to: &[u8], shape: Shape, first: &[u8], second: &[u8], depth: usize) -> Vec<u8> {
    product(to, shape, depth, |m, n, old, ks| {
        let (mut even, mut odd) = (0.0, 0.0);
        for k in ks {
            let [x, y] = [halves(dword(first, m, k)), halves(dword(second, k, n))];
            even = flush(x[0].mul_add(y[0], even));
            odd = flush(x[1].mul_add(y[1], odd));
        }
        let sum = flush(even + odd);
        flush(flush(f32::from_le_bytes(old)) + sum).to_le_bytes()
    })
}

fn halves([a, b, c, d]: [u8; 4]) -> [f32; 2] {
    [[0, 0, a, b], [0, 0, c, d]].map(|bytes| flush(f32::from_le_bytes(bytes)))
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
}
