//! Attention over a paged cache as an operation of candle: a kernel of our own on a GPU, plain loops on a CPU for the tests.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use strata_kernels::infer::Scoring;

/// The widest head that the kernel's registers hold.
pub(super) const MOST_HEAD_DIM: usize = 256;

/// `queries [rows, heads · head_dim]`, `keys` and `values [slots, kv_heads · head_dim]` → `[rows, heads · head_dim]`.
pub(super) struct PagedAttention {
    /// The blocks of each sequence, filled up to one length: `[sequences, blocks]`, u32.
    pub(super) tables: Tensor,
    /// Of each row its sequence and the tokens it attends to: `[rows, 2]`, u32.
    pub(super) rows: Tensor,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) block_tokens: usize,
    pub(super) scoring: Scoring,
}

impl PagedAttention {
    /// Rows and query heads.
    fn sizes(&self, queries: &Layout) -> Result<(usize, usize)> {
        let (rows, width) = queries.shape().dims2()?;
        Ok((rows, width / self.head_dim))
    }
}

/// The numbers of a tensor that lies in one piece.
fn piece<'a, T>(numbers: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&numbers[start..end]),
        None => bail!("paged attention needs tensors in one piece"),
    }
}

impl CustomOp3 for PagedAttention {
    fn name(&self) -> &'static str {
        "paged-attention"
    }

    fn cpu_fwd(
        &self,
        queries: &CpuStorage,
        queries_layout: &Layout,
        keys: &CpuStorage,
        keys_layout: &Layout,
        values: &CpuStorage,
        values_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, heads) = self.sizes(queries_layout)?;
        let queries = piece(queries.as_slice::<f32>()?, queries_layout)?;
        let floats = |storage: &CpuStorage, layout: &Layout| -> Result<Vec<f32>> {
            Ok(match storage {
                CpuStorage::F16(numbers) => piece(numbers, layout)?.iter().map(|x| x.to_f32()).collect(),
                _ => piece(storage.as_slice::<f32>()?, layout)?.to_vec(),
            })
        };
        let (keys, values) = (floats(keys, keys_layout)?, floats(values, values_layout)?);
        let (tables, ends) = (self.tables.to_vec2::<u32>()?, self.rows.to_vec2::<u32>()?);
        let dim = self.head_dim;
        let mut out = vec![0f32; queries.len()];
        for ((at, query), out) in queries.chunks_exact(dim).enumerate().zip(out.chunks_exact_mut(dim)) {
            let (row, head) = (at / heads, at % heads / (heads / self.kv_heads));
            let (table, len) = (&tables[ends[row][0] as usize], ends[row][1] as usize);
            let place = |token: usize| {
                let slot = table[token / self.block_tokens] as usize * self.block_tokens + token % self.block_tokens;
                (slot * self.kv_heads + head) * dim
            };
            let first = self.scoring.window.map_or(0, |window| len.saturating_sub(window));
            let score = |token: usize| {
                let dot: f32 = query.iter().zip(&keys[place(token)..]).map(|(q, k)| q * k).sum();
                let score = dot * self.scoring.scale;
                self.scoring.soft_cap.map_or(score, |cap| cap * (score / cap).tanh())
            };
            let scores: Vec<f32> = (first..len).map(score).collect();
            let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0.0;
            for (token, score) in (first..len).zip(scores) {
                let weight = (score - largest).exp();
                sum += weight;
                out.iter_mut()
                    .zip(&values[place(token)..])
                    .for_each(|(out, v)| *out += weight * v);
            }
            out.iter_mut().for_each(|x| *x /= sum);
        }
        Ok((CpuStorage::F32(out), Shape::from((rows, heads * dim))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        queries: &candle_core::CudaStorage,
        queries_layout: &Layout,
        keys: &candle_core::CudaStorage,
        keys_layout: &Layout,
        values: &candle_core::CudaStorage,
        values_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        cuda::attend(
            self,
            (queries, queries_layout),
            (keys, keys_layout),
            (values, values_layout),
        )
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::sync::OnceLock;

    use candle_core::backend::BackendStorage;
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::{CudaView, LaunchConfig, PushKernelArg};
    use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
    use candle_core::{CudaStorage, DType, Layout, Result, Shape, Storage, bail};

    use super::PagedAttention;

    /// Threads that compute one query head: four warps, as the kernel's source says.
    const THREADS: u32 = 128;
    const SOURCE: &str = include_str!("attention.cu");

    type Argument<'a> = (&'a CudaStorage, &'a Layout);

    /// The kernel for any NVIDIA GPU, compiled once in a process.
    fn ptx() -> Result<&'static str> {
        static PTX: OnceLock<std::result::Result<String, String>> = OnceLock::new();
        let compiled = PTX.get_or_init(|| {
            let toolkit = std::env::var("CUDA_HOME").unwrap_or_else(|_| "/usr/local/cuda".to_owned());
            let options = CompileOptions {
                include_paths: vec![format!("{toolkit}/include")],
                ..CompileOptions::default()
            };
            let ptx = compile_ptx_with_opts(SOURCE, options).map_err(|error| error.to_string())?;
            Ok(ptx.to_src())
        });
        match compiled {
            Ok(ptx) => Ok(ptx),
            Err(error) => bail!(
                "the attention kernel does not compile: {error}; the image needs CUDA's NVRTC and headers, and CUDA_HOME where \
                 they lie"
            ),
        }
    }

    fn view<'a, T: candle_core::cuda_backend::CudaDType>((storage, layout): Argument<'a>) -> Result<CudaView<'a, T>> {
        match layout.contiguous_offsets() {
            Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
            None => bail!("paged attention needs tensors in one piece"),
        }
    }

    pub(super) fn attend(
        op: &PagedAttention,
        queries: Argument<'_>,
        keys: Argument<'_>,
        values: Argument<'_>,
    ) -> Result<(CudaStorage, Shape)> {
        let device = queries.0.device().clone();
        let (rows, heads) = op.sizes(queries.1)?;
        let out = unsafe {
            // SAFETY: the kernel below writes every element.
            device.alloc::<f32>(rows * heads * op.head_dim)?
        };
        let half = keys.0.dtype() == DType::F16;
        let name = if half {
            "paged_attention_f16"
        } else {
            "paged_attention_f32"
        };
        let function = device.get_or_load_custom_func(name, "strata_paged_attention", ptx()?)?;
        let queries = view::<f32>(queries)?;
        let (tables, table_len) = (op.tables.storage_and_layout(), op.tables.dims2()?.1);
        let ends = op.rows.storage_and_layout();
        let on_device = |tensor: &'_ Storage| -> bool { matches!(tensor, Storage::Cuda(_)) };
        let (Storage::Cuda(tables_storage), Storage::Cuda(ends_storage)) = (&*tables.0, &*ends.0) else {
            bail!(
                "block tables are on another device ({})",
                on_device(&tables.0) || on_device(&ends.0)
            );
        };
        let tables = view::<u32>((tables_storage, tables.1))?;
        let ends = view::<u32>((ends_storage, ends.1))?;
        let numbers = [
            heads as i32,
            op.kv_heads as i32,
            op.head_dim as i32,
            op.block_tokens as i32,
            table_len as i32,
            op.scoring
                .window
                .map_or(0, |window| i32::try_from(window).unwrap_or(i32::MAX)),
        ];
        let (scale, soft_cap) = (op.scoring.scale, op.scoring.soft_cap.unwrap_or(0.0));
        let config = LaunchConfig {
            grid_dim: (heads as u32, rows as u32, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        macro_rules! launch {
            ($number:ty) => {{
                let (keys, values) = (view::<$number>(keys)?, view::<$number>(values)?);
                let mut arguments = function.builder();
                arguments
                    .arg(&queries)
                    .arg(&keys)
                    .arg(&values)
                    .arg(&tables)
                    .arg(&ends)
                    .arg(&out);
                numbers.iter().for_each(|number| {
                    arguments.arg(number);
                });
                arguments.arg(&scale).arg(&soft_cap);
                // SAFETY: the arguments are those of the kernel, in order; tables and rows name slots inside the cache.
                unsafe { arguments.launch(config) }.w()?;
            }};
        }
        match half {
            true => launch!(half::f16),
            false => launch!(f32),
        }
        Ok((
            CudaStorage::wrap_cuda_slice(out, device),
            Shape::from((rows, heads * op.head_dim)),
        ))
    }
}
