import type { Report } from './result.js'

/** The report as JUnit XML: a test case for each comparison and each control. */
export function junitOf({ cases, controls, skips, summary }: Report): string {
  const tests = [
    ...cases.map(({ name, backend, reference, passed, failure, metrics, tier }) => {
      const detail =
        failure ?? `${tier} not reached: ${metrics.mismatched} of ${metrics.total} differ, ${metrics.maxUlp} ulp`
      return testCase(
        `${name} ${backend} against ${reference}`,
        'parity',
        passed ? '' : `<failure message="${escape(detail)}"/>`,
      )
    }),
    ...controls.map(({ name, detected }) =>
      testCase(name, 'controls', detected ? '' : '<failure message="a spoiled result was not noticed"/>'),
    ),
    ...skips.map(({ name, backend, reference, reason }) =>
      testCase(`${name} ${backend} against ${reference}`, 'parity', `<skipped message="${escape(reason)}"/>`),
    ),
  ]
  const failures = summary.failed + summary.controlsMissed
  return [
    '<?xml version="1.0" encoding="UTF-8"?>',
    `<testsuite name="epmoe parity" tests="${tests.length}" failures="${failures}" skipped="${skips.length}" time="${summary.seconds}">`,
    ...tests,
    '</testsuite>',
    '',
  ].join('\n')
}

function testCase(name: string, group: string, body: string): string {
  const open = `  <testcase classname="epmoe.${group}" name="${escape(name)}"`
  return body === '' ? `${open}/>` : `${open}>${body}</testcase>`
}

function escape(text: string): string {
  return text.replace(/[&<>"]/g, (character) => `&#${character.charCodeAt(0)};`)
}
