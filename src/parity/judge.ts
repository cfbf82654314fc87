import { type Metrics, native } from '../native.js'
import type { Tensor } from '../tensor.js'
import type { Backend } from './backends.js'
import type { Oracle, OracleOutput } from './case.js'
import type { Guarded } from './guard.js'
import type { ReferenceFacts } from './references.js'
import type { CaseResult } from './result.js'
import { independentOf, passes, reached, requirementFor } from './verdict.js'

type Outputs = Record<string, { guarded: Guarded; intact: boolean }>
type Judgement = Pick<CaseResult, 'tier' | 'bound' | 'reached' | 'passed' | 'failure' | 'metrics'>

export const nothing: Metrics = { mismatched: 0, total: 0, maxUlp: 0, maxAbs: 0, relL2: 0, referenceRelL2: 0 }

/**
 * A call's outputs against a reference's, or, where those are undefined, against the oracle. All outputs have to pass;
 * what is told is the output that came out worst, with the elements of all of them counted.
 */
export function judge(
  actual: Outputs,
  reference: Outputs | undefined,
  oracle: Oracle,
  backend: Backend,
  facts: ReferenceFacts,
): Judgement {
  const judgements = oracle.outputs.map((output) => {
    const { guarded, intact } = actual[output.name]!
    return judgeOutput(guarded.tensor, intact, reference?.[output.name]?.guarded.tensor, output, backend, facts)
  })
  const worst = judgements.reduce((a, b) => (rank(b) > rank(a) ? b : a))
  return {
    ...worst,
    metrics: {
      ...worst.metrics,
      mismatched: judgements.reduce((sum, { metrics }) => sum + metrics.mismatched, 0),
      total: judgements.reduce((sum, { metrics }) => sum + metrics.total, 0),
    },
  }
}

function judgeOutput(
  actual: Tensor,
  intact: boolean,
  reference: Tensor | undefined,
  output: OracleOutput,
  backend: Backend,
  facts: ReferenceFacts,
): Judgement {
  const requirement = requirementFor(backend, facts, output.bounds)
  const metrics = compare(actual, reference ?? output.expected, output)
  const good =
    passes(requirement, metrics) ||
    (requirement.tier === 'golden' && passes(requirement, metrics, independentIn(output.expected)))
  const failure = intact ? (good ? undefined : `${output.name} differs`) : `memory around ${output.name} was written to`
  return {
    ...requirement,
    reached: reached(requirement, metrics, good),
    passed: intact && good,
    ...(failure === undefined ? {} : { failure }),
    metrics,
  }
}

const mostSorted = 2 ** 24

function independentIn(expected: Tensor): number {
  using part = expected.view([Math.min(expected.numel, mostSorted)])
  return independentOf(part.data as Float64Array)
}

/** Failures first, then what agrees least. */
function rank({ passed, reached, metrics }: Judgement): number {
  return (passed ? 0 : 1e9) + (reached === 'bit-exact' ? 0 : 1e6) + Math.min(metrics.maxUlp, 1e5)
}

function compare(actual: Tensor, reference: Tensor, { expected, scale }: OracleOutput): Metrics {
  return native().parity.compare(
    actual.handleFor('compare'),
    reference.handleFor('compare'),
    expected.handleFor('compare'),
    scale.handleFor('compare'),
  )
}
