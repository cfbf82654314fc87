/** Sizes of published models' MoE layers. */
export interface Preset {
  hidden: number
  /** Size between an expert's two matrices. */
  intermediate: number
  experts: number
  topk: number
}

export const presets: Record<string, Preset> = {
  'deepseek-v3': { hidden: 7168, intermediate: 2048, experts: 256, topk: 8 },
  'deepseek-v2-lite': { hidden: 2048, intermediate: 1408, experts: 64, topk: 6 },
  'qwen3-30b': { hidden: 2048, intermediate: 768, experts: 128, topk: 8 },
  'qwen3-235b': { hidden: 4096, intermediate: 1536, experts: 128, topk: 8 },
  'mixtral-8x7b': { hidden: 4096, intermediate: 14336, experts: 8, topk: 2 },
  'llama-4-maverick': { hidden: 5120, intermediate: 8192, experts: 128, topk: 1 },
  'kimi-k2': { hidden: 7168, intermediate: 2048, experts: 384, topk: 8 },
  'glm-4.5': { hidden: 5120, intermediate: 1536, experts: 160, topk: 8 },
  'gpt-oss-120b': { hidden: 2880, intermediate: 2880, experts: 128, topk: 4 },
}
