import { readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { checkName, findSnapshot, nextId } from '../../src/snapshot/ids.js'
import { planApply, planCreate, planDelete, planRename } from '../../src/snapshot/plan.js'
import type { Plan, SnapshotTable, Step } from '../../src/snapshot/types.js'

const table: SnapshotTable = {
  generation: 7,
  records: [
    { id: '1', name: 'first' },
    { id: '3', name: 'third' },
    { id: '4', name: '1' },
  ],
}

/** A plan in one line a step, as golden text. */
const lines = ({ steps }: Plan): string[] =>
  steps.map(step => {
    if ('tree' in step) return `${step.op} ${step.tree}`
    if ('entries' in step) {
      const entries = step.entries.map(entry =>
        'keep' in entry
          ? `${entry.keep}${entry.rename === undefined ? '' : `=${entry.rename}`}`
          : `+${entry.create.id}`,
      )
      return `${step.op} ${entries.join(' ')}`.trim()
    }
    return step.op
  })

const plans = {
  create: planCreate(table, { name: 'new', date: new Date(1_700_000_000_123) }),
  apply: planApply(table, 'third'),
  delete: planDelete(table, '3'),
  rename: planRename(table, 'first', 'erste'),
}

describe('plans', () => {
  // The same text is what the engine's own tests, power cuts among them, execute.
  it('are the golden ones', () => {
    expect(plans.create.created).toEqual({ id: '5', name: 'new', dateSec: 1_700_000_000, dateNsec: 123_000_000 })
    const golden = readFileSync(new URL('snapshot-plans.txt', import.meta.url), 'utf8')
    const named = golden
      .split('\n\n')
      .slice(1)
      .map(text => text.trimEnd().split('\n'))
    expect([
      ['create new', ...lines(plans.create)],
      ['apply third', ...lines(plans.apply)],
      ['delete 3', ...lines(plans.delete)],
      ['rename first erste', ...lines(plans.rename)],
    ]).toEqual(named)
  })

  it.each(Object.entries(plans))('%s never relies on what no barrier made durable', (_, plan) => {
    expect(plan.generation).toBe(7)
    const writes: Step['op'][] = ['share', 'drop', 'restore-copied', 'write-table', 'switch']
    let unsettled = false
    for (const { op } of plan.steps) {
      if (op === 'switch' || op === 'free') expect(unsettled, op).toBe(false)
      if (op === 'barrier') unsettled = false
      else if (writes.includes(op)) unsettled = true
    }
    expect(unsettled).toBe(false)
  })

  it.each(Object.entries(plans))('%s changes the image once, and counts only in a fork', (_, plan) => {
    const ops = plan.steps.map(({ op }) => op)
    expect(ops.filter(op => op === 'switch')).toHaveLength(1)
    const counts = ops.findIndex(op => op === 'share' || op === 'drop')
    if (counts >= 0) expect(ops.slice(0, counts)).toContain('fork')
    const behind = ops.slice(ops.indexOf('switch') + 1)
    expect(behind.filter(op => op !== 'barrier' && op !== 'free')).toEqual([])
  })
})

describe('ids and names', () => {
  it('numbers on from the largest id', () => {
    expect(nextId([])).toBe('1')
    expect(nextId(table.records)).toBe('5')
    expect(nextId([{ id: 'x', name: '' }])).toBe('1')
    expect(nextId([{ id: '99999999999999999999', name: '' }])).toBe('100000000000000000000')
  })

  it('looks for ids before names', () => {
    expect(findSnapshot(table.records, '1')).toBe(0)
    expect(findSnapshot(table.records, 'third')).toBe(1)
    expect(() => findSnapshot(table.records, 'none')).toThrow(
      expect.objectContaining({ code: 'ERR_QCOW2_NO_SNAPSHOT' }),
    )
  })

  it.each([[''], ['a\0b'], ['x'.repeat(65536)], [7], [undefined]])('refuses the name %j', name => {
    expect(() => checkName(name, 'name')).toThrow(expect.objectContaining({ code: 'ERR_QCOW2_INVALID_ARGUMENT' }))
  })
})
