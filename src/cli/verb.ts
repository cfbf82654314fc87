import type { Command } from 'commander'
import { EpmoeError } from '../errors.js'

/** One verb of the command line: a module in verbs/ exports it as default. */
export interface Verb {
  name: string
  summary: string
  /** Declares options and arguments. */
  configure(command: Command): void
  /** Resolves to the exit code. */
  run(options: never, args: string[]): Promise<number>
}

export const exitCodes = { passed: 0, failed: 1, usage: 2, environment: 3 } as const

export function usageError(option: string, expected: string, received: string): EpmoeError {
  return new EpmoeError({ code: 'ERR_USAGE', argument: option, expected, received })
}

/** Parses `1,2,64` as whole numbers from `least` on. */
export function wholeNumbers(option: string, least: number) {
  return (text: string): number[] =>
    text.split(',').map((part) => {
      const value = Number(part)
      if (!/^\d+$/.test(part.trim()) || value < least)
        throw usageError(option, `whole numbers from ${least} on, separated by commas`, text)
      return value
    })
}

/** Parses `a,b` as names out of `known`; `all` is every one. */
export function namesOf<Name extends string>(option: string, known: readonly Name[]) {
  return (text: string): Name[] => {
    if (text === 'all') return [...known]
    return text.split(',').map((part) => {
      const name = known.find((candidate) => candidate === part.trim())
      if (name === undefined) throw usageError(option, `all, or some of ${known.join(', ')}`, part)
      return name
    })
  }
}
