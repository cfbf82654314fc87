import type { Command } from 'commander'
import { EpmoeError, PythonError } from '../../errors.js'
import { type KernelMode, kernelModes } from '../../serve/model.js'
import { exitCodes, usageError, type Verb } from '../verb.js'

interface Options {
  model: string
  name?: string
  host: string
  port: number
  mode: KernelMode
  numerics: 'fp32' | 'triton'
  cudaGraphTokens?: number
  device?: string
  dtype?: string
  seed: number
  slots: number
  queue: number
  context: number
  batchTokens: number
  tokenLimit?: number
  bodyLimit: number
  shadowEvery: number
  grace: number
}

const verb: Verb = {
  name: 'serve',
  summary: 'serve a MoE model over HTTP as OpenAI does, its experts by epmoe, by transformers, or both compared',
  configure(command: Command) {
    command
      .option(
        '--model <name>',
        'qwen3-moe or mixtral with random weights, or a folder of a Hugging Face model',
        'qwen3-moe',
      )
      .option('--name <name>', 'what clients call it; default: its name, or its folder’s')
      .option('--host <address>', 'there is no authentication: think before opening it', '127.0.0.1')
      .option('--port <number>', '0 takes a free one', whole('--port', 0, 65535), 8000)
      .option(
        '--mode <mode>',
        'who computes the experts: original, shadow, epmoe',
        oneOf('--mode', kernelModes),
        'epmoe',
      )
      .option(
        '--numerics <kind>',
        'arithmetic of epmoe: fp32 or triton',
        oneOf('--numerics', ['fp32', 'triton']),
        'fp32',
      )
      .option(
        '--cuda-graph-tokens <count>',
        'on CUDA, replay blocks of passes with at most so many tokens; default: as many as slots',
        whole('--cuda-graph-tokens', 0),
      )
      .option('--device <name>', 'cpu, cuda:0, …; default: the first GPU, or cpu', device)
      .option(
        '--dtype <name>',
        'float32, bfloat16, float16; default: the model’s',
        oneOf('--dtype', ['float32', 'bfloat16', 'float16']),
      )
      .option('--seed <number>', 'of random weights', whole('--seed', 0), 0)
      .option('--slots <count>', 'sequences in a forward pass', whole('--slots', 1), 8)
      .option('--queue <count>', 'requests that may wait for a slot', whole('--queue', 0), 64)
      .option('--context <tokens>', 'tokens of a sequence, prompt included', whole('--context', 2), 2048)
      .option(
        '--batch-tokens <count>',
        'tokens in a forward pass; longer prompts are cut',
        whole('--batch-tokens', 1),
        512,
      )
      .option(
        '--token-limit <count>',
        'tokens that a request may ask for; default: the context',
        whole('--token-limit', 1),
      )
      .option('--body-limit <bytes>', 'of a request', whole('--body-limit', 1), 1 << 20)
      .option(
        '--shadow-every <count>',
        'in shadow mode, compare one of so many forward passes',
        whole('--shadow-every', 1),
        1,
      )
      .option('--grace <seconds>', 'for running requests once the server is told to end', whole('--grace', 0), 30)
  },
  async run({ grace, ...options }: Options) {
    // What only this verb needs is loaded here, so that the others start without.
    const { serve } = await import('../../serve/index.js')
    const server = await serve(options).catch((error: unknown) => {
      if (error instanceof PythonError && error.pythonType === 'ValueError')
        throw new EpmoeError({ code: 'ERR_USAGE', received: error.pythonMessage }, { cause: error })
      const { syscall, message } = error as NodeJS.ErrnoException
      if (syscall === 'listen' || syscall === 'getaddrinfo')
        throw usageError('--host, --port', 'an address of this machine with a free port', message)
      throw error
    })
    const { facts } = server.model
    console.log(
      `${server.url} serves ${server.name}: ${facts.architecture}, ${facts.dtype} on ${facts.device}, ` +
        `${facts.layers} MoE blocks, experts by ${server.model.mode}`,
    )
    await told()
    console.error(`finishing ${server.batcher.running + server.batcher.waiting} requests, for ${grace} s at most`)
    await server.close({ graceSeconds: grace }).catch((error: Error) => {
      console.error(`epmoe: ${error.message}`)
      process.exit(exitCodes.failed) // what does not end would keep the process
    })
    return exitCodes.passed
  },
}
export default verb

/** Resolves at the first SIGINT or SIGTERM; a second one ends the process as it would have without us. */
function told(): Promise<void> {
  return new Promise((resolve) => {
    const first = () => {
      for (const signal of signals) process.off(signal, first)
      resolve()
    }
    for (const signal of signals) process.on(signal, first)
  })
}

const signals = ['SIGINT', 'SIGTERM'] as const

function whole(option: string, least: number, most = Number.MAX_SAFE_INTEGER) {
  return (text: string): number => {
    const value = Number(text)
    if (/^\d+$/.test(text) && value >= least && value <= most) return value
    throw usageError(
      option,
      `a whole number from ${least} ${most < Number.MAX_SAFE_INTEGER ? `to ${most}` : 'on'}`,
      text,
    )
  }
}

function device(text: string): string {
  if (/^(cpu|cuda(:\d{1,4})?)$/.test(text)) return text
  throw usageError('--device', 'cpu, cuda, or cuda:0 and so on', text)
}

function oneOf(option: string, names: readonly string[]) {
  return (text: string): string => {
    if (names.includes(text)) return text
    throw usageError(option, names.join(', '), text)
  }
}
