//! How full a component is, as a row of small bars.

/// At most this many.
const CELLS: usize = 16;
const BARS: [char; 9] = ['·', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// The unit of the wire format, and of a cache.
const LINE_BYTES: usize = 64;

/// Of how many lines how many are not zero.
pub(crate) fn lines(content: &[u8]) -> (usize, usize) {
    let lines = content.chunks(LINE_BYTES);
    let all = lines.len();
    let used = lines.filter(|line| line.iter().any(|&byte| byte != 0));
    (used.count(), all)
}

/// A bar for each line, or for as many as it takes to be at most sixteen; its height is how many of
/// its bytes are not zero.
pub(crate) fn bars(content: &[u8]) -> String {
    let (_, all) = lines(content);
    let per_cell = all.div_ceil(CELLS).max(1).saturating_mul(LINE_BYTES);
    content
        .chunks(per_cell)
        .map(|cell| {
            let used = cell.iter().filter(|&&byte| byte != 0).count();
            // 0 for nothing, 1 to 8 for anything.
            let height = used.saturating_mul(8).div_ceil(cell.len().max(1));
            BARS.get(height).copied().unwrap_or('█')
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_high_as_its_lines_are_full() {
        let mut content = [0; 256];
        assert_eq!(bars(&content), "····");
        content[0] = 1;
        content[64..96].fill(1);
        content[128..192].fill(255);
        assert_eq!(bars(&content), "▁▄█·");
        assert_eq!(lines(&content), (3, 4));
        assert_eq!(bars(&[1; 8]), "█");
        assert_eq!(bars(&[0; 8192]).chars().count(), 16);
        assert_eq!(bars(&[]), "");
    }
}
