// The set-up's only reader of EPMOE_* variables.
export const settings = {
  /** The interpreter whose environment to use as it is, instead of making a venv. */
  python: process.env['EPMOE_PYTHON'] || undefined,
  /** `1`: CUDA must be built. `0`: it must not. Otherwise it is when nvcc is found. */
  cuda: { 1: 'on', 0: 'off' }[process.env['EPMOE_CUDA'] ?? ''] ?? 'auto',
  /** CMAKE_CUDA_ARCHITECTURES for the kernels, e.g. `90-real`. */
  cudaArchitectures: process.env['EPMOE_CUDA_ARCHITECTURES'] || undefined,
}
