//! Machines that are not here, from published figures: enough of a cost model to compare plans with.
//!
//! `machines/machines.toml` has processors, links, kernels, hosts and machines made of them, each figure with its
//! source. A user's file has the same form, may use the built-in parts by name, and describes one machine.

use crate::{CostError, CostModel, GemmCost, HostCost, LinkCost, Piecewise, RowsCost, ShareCost};
use epsmoe_base::DType;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The built-in catalog.
const CATALOG: &str = include_str!("../machines/machines.toml");

/// A figure and where it is from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sourced<T> {
    /// The figure.
    pub value: T,
    /// Published, measured, derived or assumed, and by whom or from what.
    pub source: String,
}

/// One kind of processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Memory.
    pub memory_bytes: Sourced<u64>,
    /// Best rate of a large bf16 product.
    pub flops_per_second: Sourced<u64>,
    /// Best rate of its memory.
    pub memory_bytes_per_second: Sourced<u64>,
    /// Whether it multiplies FP8 codes.
    #[serde(default)]
    pub multiplies_fp8: bool,
}

/// One kind of link, as one GPU sees it while all use it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkFigures {
    /// Paid once by an exchange.
    pub start_ns: Sourced<u64>,
    /// Larger direction of one GPU.
    pub bytes_per_second: Sourced<u64>,
}

impl LinkFigures {
    fn curve(&self) -> Piecewise {
        Piecewise::line(self.start_ns.value, self.bytes_per_second.value)
    }
}

/// How well a kernel uses a processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelFigures {
    /// Rows per expert → permille.
    pub rows: Piecewise,
    /// Depth K → permille.
    pub depth: Piecewise,
    /// Besides the arithmetic.
    pub op_ns: u64,
}

/// A generation of kernels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernels {
    /// Of the two kinds of GEMM.
    pub source: String,
    /// One call over all experts.
    pub grouped: KernelFigures,
    /// One call per expert.
    pub dense: KernelFigures,
    /// Sequence length → permille, for causal attention.
    pub attention: Sourced<Piecewise>,
    /// Ways to divide the processor.
    pub shares: Sourced<Vec<ShareCost>>,
}

/// A host's work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct HostFigures {
    source: String,
    #[serde(flatten)]
    cost: HostCost,
}

/// A machine, as the catalog names its parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MachineNames {
    about: String,
    ranks: usize,
    #[serde(default)]
    node_ranks: usize,
    gpu: String,
    kernels: String,
    host: String,
    near: String,
    far: Option<String>,
}

/// A file of parts and machines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Catalog {
    gpu: BTreeMap<String, Gpu>,
    link: BTreeMap<String, LinkFigures>,
    kernels: BTreeMap<String, Kernels>,
    host: BTreeMap<String, HostFigures>,
    machine: BTreeMap<String, MachineNames>,
}

/// A machine with all its figures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// What it is called.
    pub name: String,
    /// In a line.
    pub about: String,
    /// GPUs, one rank each.
    pub ranks: usize,
    /// GPUs of one node; 0: all of them.
    pub node_ranks: usize,
    /// The processor.
    pub gpu: Gpu,
    /// The kernels.
    pub kernels: Kernels,
    /// Their name.
    pub kernels_name: String,
    /// The link inside a node.
    pub near: LinkFigures,
    /// The link between nodes.
    pub far: Option<LinkFigures>,
    host: HostCost,
}

impl Machine {
    /// Names of the built-in machines.
    pub fn names() -> Vec<String> {
        Catalog::built_in().machine.into_keys().collect()
    }

    /// A built-in machine.
    ///
    /// ```
    /// # use epsmoe_plan::Machine;
    /// let machine = Machine::built_in("8xH800").unwrap();
    /// assert_eq!(machine.ranks, 8);
    /// assert!(machine.near.bytes_per_second.source.contains("DeepEP"));
    /// assert!(Machine::built_in("8xB300").unwrap_err().to_string().contains("no machine is called `8xB300`"));
    /// ```
    pub fn built_in(name: &str) -> Result<Self, CostError> {
        Catalog::built_in().machine(name)
    }

    /// The one machine that a file describes.
    pub fn parse(text: &str) -> Result<Self, CostError> {
        let own = Catalog::parse(text)?;
        let names: Vec<&String> = own.machine.keys().collect();
        let [name] = names.as_slice() else {
            let why = format!("it has {} tables [machine.NAME]; there must be one", names.len());
            return Err(CostError::Unreadable { what: "a machine", why });
        };
        let name = name.to_string();
        let mut all = Catalog::built_in();
        all.gpu.extend(own.gpu);
        all.link.extend(own.link);
        all.kernels.extend(own.kernels);
        all.host.extend(own.host);
        all.machine.extend(own.machine);
        all.machine(&name)
    }

    /// The same machine with other kernels of the catalog.
    pub fn with_kernels(self, name: &str) -> Result<Self, CostError> {
        let kernels = find("kernels", &Catalog::built_in().kernels, name)?;
        Ok(Machine { kernels, kernels_name: name.into(), ..self })
    }

    /// What work costs there, in bf16.
    pub fn cost(&self) -> CostModel {
        let (gpu, kernels) = (&self.gpu, &self.kernels);
        let memory = gpu.memory_bytes_per_second.value;
        let gemm = |figures: &KernelFigures| GemmCost {
            flops_per_second: gpu.flops_per_second.value,
            rows: figures.rows.clone(),
            depth: figures.depth.clone(),
            weight_bytes_per_second: memory,
            op_ns: figures.op_ns,
            least_columns: 0,
            tiles: None,
        };
        // A kernel over rows: launch, then every byte read and written once.
        let moved = |parts: u64| Piecewise::line(kernels.dense.op_ns, memory / parts);
        CostModel {
            version: CostModel::VERSION,
            machine: self.name.clone(),
            kernels: self.kernels_name.clone(),
            dtype: DType::BF16,
            concurrent: 0,
            lane_threads: 1,
            grouped: gemm(&kernels.grouped),
            dense: gemm(&kernels.dense),
            link: LinkCost {
                exchange_ns: 2_000,
                node_ranks: self.node_ranks as u32,
                near: self.near.curve(),
                far: self.far.as_ref().map_or(Piecewise::flat(0), LinkFigures::curve),
                copy: Piecewise::flat(0),
            },
            rows: RowsCost {
                gather: moved(2),
                reduce: moved(2),
                host_to_device: moved(2),
                route: moved(4),
                index: moved(32),
            },
            host: self.host.clone(),
            shares: kernels.shares.value.clone(),
        }
    }

    /// A collective in which a GPU sends `bytes` in all, in equal parts to every other: ring or all-to-all.
    pub fn collective_ns(&self, bytes: u64) -> u64 {
        let near = self.near.curve().extended(bytes);
        match (&self.far, self.node_ranks) {
            // Of what goes to all others, what leaves the node; a ring sends 1/node of it out, and starts twice.
            (Some(far), node) if node > 0 => near + far.curve().extended(bytes / node as u64),
            _ => near,
        }
    }
}

impl Catalog {
    fn built_in() -> Self {
        Self::parse(CATALOG).unwrap_or_else(|error| unreachable!("the built-in catalog is tested: {error}"))
    }

    fn parse(text: &str) -> Result<Self, CostError> {
        toml::from_str(text)
            .map_err(|error| CostError::Unreadable { what: "a machine", why: error.to_string() })
    }

    fn machine(&self, name: &str) -> Result<Machine, CostError> {
        let names = find("machine", &self.machine, name)?;
        let link = |name: &String| find("link", &self.link, name);
        if names.ranks == 0 || (names.node_ranks > 0) != names.far.is_some() {
            let why = format!("{name} needs ranks, and node_ranks exactly when it has a far link");
            return Err(CostError::Unreadable { what: "a machine", why });
        }
        let machine = Machine {
            name: name.into(),
            about: names.about,
            ranks: names.ranks,
            node_ranks: names.node_ranks,
            gpu: find("gpu", &self.gpu, &names.gpu)?,
            kernels: find("kernels", &self.kernels, &names.kernels)?,
            kernels_name: names.kernels,
            near: link(&names.near)?,
            far: names.far.as_ref().map(link).transpose()?,
            host: find("host", &self.host, &names.host)?.cost,
        };
        machine.cost().check()?;
        Ok(machine)
    }
}

fn find<T: Clone>(what: &'static str, all: &BTreeMap<String, T>, name: &str) -> Result<T, CostError> {
    all.get(name).cloned().ok_or_else(|| CostError::Unknown {
        what,
        name: name.into(),
        known: all.keys().map(String::as_str).collect::<Vec<_>>().join(", "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_machine_is_whole_and_says_its_sources() {
        let kinds = ["published", "measured", "derived", "assumed"];
        let told = |source: &str| kinds.iter().any(|kind| source.starts_with(kind));
        for name in Machine::names() {
            let machine = Machine::built_in(&name).unwrap();
            let cost = machine.cost();
            assert_eq!(CostModel::parse(&cost.to_text()).unwrap(), cost, "{name}");
            let (gpu, kernels) = (&machine.gpu, &machine.kernels);
            let links = [Some(&machine.near), machine.far.as_ref()];
            let links = links.into_iter().flatten().flat_map(|link| [&link.start_ns, &link.bytes_per_second]);
            let figures = [&gpu.memory_bytes, &gpu.flops_per_second, &gpu.memory_bytes_per_second];
            for figure in links.chain(figures) {
                assert!(told(&figure.source), "{name}: {}", figure.source);
            }
            for source in [&kernels.source, &kernels.attention.source, &kernels.shares.source] {
                assert!(told(source), "{name}: {source}");
            }
        }
    }

    #[test]
    fn a_file_may_use_built_in_parts() {
        let text = "[link.slow]\nstart_ns = { value = 1, source = \"assumed\" }\n\
                    bytes_per_second = { value = 1_000_000_000, source = \"assumed\" }\n\
                    [machine.mine]\nabout = \"\"\nranks = 2\ngpu = \"h200\"\nkernels = \"hopper-2026\"\n\
                    host = \"server\"\nnear = \"slow\"\n";
        let machine = Machine::parse(text).unwrap();
        assert_eq!(machine.collective_ns(5_000_000), 5_000_001);
        let refused = |from: &str, to: &str| Machine::parse(&text.replace(from, to)).unwrap_err().to_string();
        assert!(refused("h200", "h201").contains("no gpu is called `h201`: there are a100, h100"));
        assert!(refused("ranks = 2", "ranks = 0").contains("needs ranks"));
        assert!(refused("ranks = 2", "nodes = 2").contains("nodes"));
        assert!(refused("[machine.mine]", "[machine.mine.two]").contains("cannot be read"));
        assert!(Machine::parse("").unwrap_err().to_string().contains("0 tables"));
        assert!(machine.with_kernels("hopper-2024").is_ok());
    }
}
