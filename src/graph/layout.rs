//! [`Layout`]: where the nodes and edges of a graph lie, from top to bottom.
//!
//! Layered drawing after Sugiyama, Tagawa and Toda (1981): an edge over several layers goes
//! through a place in each; the order within a layer comes from the mean of the neighbours;
//! places come from least squares with a least distance. Knows sizes, and nothing of what the
//! nodes show. Invariant: boxes of one layer do not overlap, and keep their order.

/// Pixels between boxes of one layer.
const GAP: f64 = 28.0;
/// Pixels between the boxes of two layers.
pub(super) const RISE: f64 = 46.0;
/// Width of the place where an edge passes through a layer.
const PASS: f64 = 10.0;
/// Rounds of ordering and of placing.
const ROUNDS: usize = 12;
/// Most places where edges pass; with more, long edges go straight across.
const PASSES: usize = 200_000;

/// A node as it is to be laid out.
#[derive(Debug, Clone)]
pub(super) struct Block {
    /// Pixels.
    pub(super) width: f64,
    /// Which layer it is in.
    pub(super) layer: usize,
    /// The places of the nodes it needs.
    pub(super) needs: Vec<usize>,
}

/// Where everything lies, in pixels.
#[derive(Debug, Default)]
pub(super) struct Layout {
    /// Left edge of each node.
    pub(super) left: Vec<f64>,
    /// Each edge: the points that it passes, from the bottom of one box to the top of another.
    pub(super) edges: Vec<Vec<(f64, f64)>>,
    /// Width of it all.
    pub(super) width: f64,
    /// Height of it all.
    pub(super) height: f64,
}

/// A box, or the place where an edge passes.
struct Spot {
    width: f64,
    layer: usize,
    x: f64,
    up: Vec<usize>,
    down: Vec<usize>,
    passes: bool,
}

/// Lays out boxes of one height.
pub(super) fn layout(blocks: &[Block], height: f64) -> Layout {
    let mut grid = Grid::new(blocks);
    grid.order();
    grid.place();
    grid.finish(blocks, height)
}

struct Grid {
    /// The nodes, then the places where edges pass.
    spots: Vec<Spot>,
    layers: Vec<Vec<usize>>,
    /// The place of each spot in its layer.
    rank: Vec<usize>,
    /// Each edge: the spots from one node to the other.
    ways: Vec<Vec<usize>>,
}

impl Grid {
    fn new(blocks: &[Block]) -> Self {
        let spot = |width, layer, passes| Spot {
            width,
            layer,
            x: 0.0,
            up: Vec::new(),
            down: Vec::new(),
            passes,
        };
        let layers = rows(blocks);
        let mut spots: Vec<Spot> = blocks
            .iter()
            .zip(&layers)
            .map(|(b, layer)| spot(b.width, *layer, false))
            .collect();
        let mut ways = Vec::new();
        let needs = blocks.iter().enumerate();
        let spans = needs.flat_map(|(to, b)| b.needs.iter().map(move |from| (*from, to)));
        let passes: usize = spans.map(|(from, to)| layers[to] - layers[from] - 1).sum();
        for (to, block) in blocks.iter().enumerate() {
            for &from in &block.needs {
                let mut way = vec![from];
                if passes > PASSES && layers[to] - layers[from] > 1 {
                    ways.push(vec![from, to]);
                    continue;
                }
                for layer in layers[from] + 1..layers[to] {
                    spots.push(spot(PASS, layer, true));
                    way.push(spots.len() - 1);
                }
                way.push(to);
                for pair in way.windows(2) {
                    spots[pair[0]].down.push(pair[1]);
                    spots[pair[1]].up.push(pair[0]);
                }
                ways.push(way);
            }
        }
        let depth = spots.iter().map(|s| s.layer + 1).max().unwrap_or(0);
        let mut layers = vec![Vec::new(); depth];
        for (i, spot) in spots.iter().enumerate() {
            layers[spot.layer].push(i);
        }
        let mut grid = Self {
            rank: vec![0; spots.len()],
            spots,
            layers,
            ways,
        };
        (0..depth).for_each(|layer| grid.count(layer));
        grid
    }

    /// Notes the place of each member of a layer in its order.
    fn count(&mut self, layer: usize) {
        for (place, i) in self.layers[layer].iter().enumerate() {
            self.rank[*i] = place;
        }
    }

    /// Orders each layer by the mean place of its neighbours, down and up in turn; the order
    /// with the fewest crossings is kept.
    fn order(&mut self) {
        let mut best = (self.crossings(), self.layers.clone());
        for round in 0..ROUNDS {
            let down = round % 2 == 0;
            let depth = self.layers.len();
            for step in 1..depth {
                let layer = if down { step } else { depth - 1 - step };
                self.sort(layer, down);
            }
            let crossings = self.crossings();
            if crossings < best.0 {
                best = (crossings, self.layers.clone());
            }
        }
        self.layers = best.1;
        (0..self.layers.len()).for_each(|layer| self.count(layer));
    }

    fn sort(&mut self, layer: usize, by_upper: bool) {
        let mean = |i: usize| {
            let spot = &self.spots[i];
            let near = if by_upper { &spot.up } else { &spot.down };
            let sum: usize = near.iter().map(|n| self.rank[*n]).sum();
            match near.len() {
                // What has no neighbour there stays where it is.
                0 => self.rank[i] as f64,
                n => sum as f64 / n as f64,
            }
        };
        let members = self.layers[layer].iter();
        let mut keyed: Vec<(f64, usize)> = members.map(|i| (mean(*i), *i)).collect();
        keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
        self.layers[layer] = keyed.into_iter().map(|(_, i)| i).collect();
        self.count(layer);
    }

    fn crossings(&self) -> usize {
        let across = |layer: &Vec<usize>| {
            let mut ends: Vec<usize> = Vec::new();
            for &i in layer {
                let down = self.spots[i].down.iter();
                let mut own: Vec<usize> = down.map(|d| self.rank[*d]).collect();
                own.sort_unstable();
                ends.extend(own);
            }
            inversions(&ends)
        };
        self.layers.iter().map(across).sum()
    }

    /// Gives each spot its middle.
    fn place(&mut self) {
        for layer in 0..self.layers.len() {
            let start = vec![0.0; self.layers[layer].len()];
            self.settle(layer, &start);
        }
        // The last sweep goes up: what comes before lies straight above what needs it.
        for round in 0..2 * ROUNDS {
            let depth = self.layers.len();
            let down = round % 2 == 0;
            for step in 0..depth {
                let layer = if down { step } else { depth - 1 - step };
                let members = self.layers[layer].iter();
                let wanted: Vec<f64> = members.map(|i| self.wanted(*i, down)).collect();
                self.settle(layer, &wanted);
            }
        }
    }

    /// The middle that a spot would have best: that of its neighbours on one side. Looking at
    /// one side alone keeps long edges straight, with their bends at one end.
    fn wanted(&self, i: usize, by_upper: bool) -> f64 {
        let spot = &self.spots[i];
        let near = if by_upper { &spot.up } else { &spot.down };
        let sum: f64 = near.iter().map(|n| self.spots[*n].x).sum();
        match near.len() {
            0 => spot.x,
            n => sum / n as f64,
        }
    }

    /// Places a layer as near as it can be to `wanted`, in order and without overlap: the
    /// least squares solution, by merging neighbours that would overlap (isotonic regression).
    fn settle(&mut self, layer: usize, wanted: &[f64]) {
        let members = &self.layers[layer];
        // Places less the room that those before need: then the order alone matters.
        let mut room = 0.0;
        let mut rooms = Vec::with_capacity(members.len());
        for (i, member) in members.iter().enumerate() {
            if i > 0 {
                let before = &self.spots[members[i - 1]];
                room += (before.width + self.spots[*member].width) / 2.0 + GAP;
            }
            rooms.push(room);
        }
        let mut pools: Vec<(f64, usize)> = Vec::new();
        for (wanted, room) in wanted.iter().zip(&rooms) {
            let (mut sum, mut n) = (wanted - room, 1);
            while let Some((before, count)) = pools.last()
                && before / *count as f64 > sum / n as f64
            {
                sum += before;
                n += count;
                pools.pop();
            }
            pools.push((sum, n));
        }
        let places = pools
            .iter()
            .flat_map(|(sum, n)| std::iter::repeat_n(sum / *n as f64, *n));
        let placed: Vec<f64> = places.zip(&rooms).map(|(x, room)| x + room).collect();
        for (member, x) in self.layers[layer].iter().zip(placed) {
            self.spots[*member].x = x;
        }
    }

    fn finish(mut self, blocks: &[Block], height: f64) -> Layout {
        let left = |s: &Spot| s.x - s.width / 2.0;
        let least = self.spots.iter().map(left).fold(f64::INFINITY, f64::min);
        let least = if least.is_finite() { least } else { 0.0 };
        self.spots.iter_mut().for_each(|s| s.x -= least);
        let right = self.spots.iter().map(|s| s.x + s.width / 2.0);
        let top = |layer: usize| layer as f64 * (height + RISE);
        let edges = self.ways.iter().map(|way| self.way(way, height, &top));
        Layout {
            edges: edges.collect(),
            width: right.fold(0.0, f64::max),
            height: (top(self.layers.len()) - RISE).max(0.0),
            left: self.spots[..blocks.len()].iter().map(left).collect(),
        }
    }

    fn way(&self, way: &[usize], height: f64, top: &dyn Fn(usize) -> f64) -> Vec<(f64, f64)> {
        let mut points = Vec::with_capacity(2 * way.len());
        for (at, &i) in way.iter().enumerate() {
            let spot = &self.spots[i];
            let y = top(spot.layer);
            if at > 0 {
                let x = spot.x + self.port(i, &spot.up, way[at - 1]);
                points.push((x, y));
            }
            if at + 1 < way.len() {
                let x = spot.x + self.port(i, &spot.down, way[at + 1]);
                points.push((x, y + height));
            }
        }
        points
    }

    /// How far from the middle of a box an edge meets it: edges are spread in the order of
    /// their other ends.
    fn port(&self, i: usize, near: &[usize], other: usize) -> f64 {
        let spot = &self.spots[i];
        if spot.passes || near.len() < 2 {
            return 0.0;
        }
        let x = self.spots[other].x;
        let before = near.iter().filter(|n| self.spots[**n].x < x).count();
        let spread = (spot.width * 0.6).min(18.0 * (near.len() - 1) as f64);
        spread * (before as f64 / (near.len() - 1) as f64 - 0.5)
    }
}

/// The layers, where a node from which more edges go out than come in lies as low as it can:
/// it is then near to what needs it.
pub(super) fn rows(blocks: &[Block]) -> Vec<usize> {
    let mut layers: Vec<usize> = blocks.iter().map(|b| b.layer).collect();
    let mut after: Vec<Vec<usize>> = vec![Vec::new(); blocks.len()];
    for (i, block) in blocks.iter().enumerate() {
        block.needs.iter().for_each(|n| after[*n].push(i));
    }
    for i in (0..blocks.len()).rev() {
        if let Some(lowest) = after[i].iter().map(|a| layers[*a]).min()
            && after[i].len() > blocks[i].needs.len()
        {
            layers[i] = layers[i].max(lowest.saturating_sub(1));
        }
    }
    layers
}

/// Pairs that are in the wrong order, counted with a tree of sums.
fn inversions(list: &[usize]) -> usize {
    let size = list.iter().max().map_or(0, |m| m + 2);
    let mut tree = vec![0usize; size + 1];
    let mut count = 0;
    for (seen, value) in list.iter().enumerate() {
        let mut at = value + 1;
        let mut smaller = 0;
        while at > 0 {
            smaller += tree[at];
            at &= at - 1;
        }
        count += seen - smaller;
        let mut at = value + 1;
        while at <= size {
            tree[at] += 1;
            at += at & at.wrapping_neg();
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blocks(masks: &[u8]) -> Vec<Block> {
        let mut list: Vec<Block> = Vec::new();
        for (i, mask) in masks.iter().enumerate() {
            let near = i.saturating_sub(8)..i;
            let needs: Vec<usize> = near.filter(|b| mask >> (i - 1 - b) & 1 == 1).collect();
            let layer = needs.iter().map(|n| list[*n].layer + 1).max().unwrap_or(0);
            list.push(Block {
                width: 60.0 + f64::from(*mask),
                layer,
                needs,
            });
        }
        list
    }

    proptest! {
        #[test]
        fn boxes_do_not_overlap_and_edges_go_down(masks in proptest::collection::vec(any::<u8>(), 1..40)) {
            let blocks = blocks(&masks);
            let laid = layout(&blocks, 40.0);
            let layers = rows(&blocks);
            for a in 0..blocks.len() {
                prop_assert!(laid.left[a] >= -1e-6);
                prop_assert!(laid.left[a] + blocks[a].width <= laid.width + 1e-6);
                for b in 0..a {
                    if layers[a] == layers[b] {
                        let (l, r) = if laid.left[a] < laid.left[b] { (a, b) } else { (b, a) };
                        prop_assert!(laid.left[l] + blocks[l].width + GAP <= laid.left[r] + 1e-6);
                    }
                }
                for n in &blocks[a].needs {
                    prop_assert!(layers[*n] < layers[a]);
                }
            }
            prop_assert_eq!(laid.edges.len(), blocks.iter().map(|b| b.needs.len()).sum::<usize>());
            for edge in &laid.edges {
                prop_assert!(edge.windows(2).all(|p| p[0].1 <= p[1].1));
            }
        }

        #[test]
        fn inversions_are_counted(list in proptest::collection::vec(0usize..20, 0..30)) {
            let mut slow = 0;
            for (i, a) in list.iter().enumerate() {
                slow += list[i..].iter().filter(|b| *b < a).count();
            }
            prop_assert_eq!(inversions(&list), slow);
        }
    }

    #[test]
    fn crossings_that_need_not_be_are_undone() {
        let block = |layer, needs: &[usize]| Block {
            width: 50.0,
            layer,
            needs: needs.to_vec(),
        };
        let crossed = [block(0, &[]), block(0, &[]), block(1, &[1]), block(1, &[0])];
        let mut grid = Grid::new(&crossed);
        assert_eq!(grid.crossings(), 1);
        grid.order();
        assert_eq!(grid.crossings(), 0);
    }
}
